"""Folders of images, one per class."""

from pathlib import Path

from PIL import Image


def class_folders(root: Path, names: str, images: int = 3) -> str:
    """Writes images for each letter in `names`. An image depends only on its letter and number.

    Returns: the folder, as a source.
    """
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images):
            color = (40 * (ord(name) - ord("a")), 60 * i, 0)
            Image.new("RGB", (20, 20), color).save(root / name / f"{i}.png")
    return str(root)
