"""Pictures in a folder for each class."""

from pathlib import Path

from PIL import Image


def class_folders(root: Path, names: str, images: int = 3) -> str:
    """Writes so many pictures for each letter, which depend on letter and number alone.

    Returns: the folder, a source.
    """
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images):
            color = (40 * (ord(name) - ord("a")), 60 * i, 0)
            Image.new("RGB", (20, 20), color).save(root / name / f"{i}.png")
    return str(root)
