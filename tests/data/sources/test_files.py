"""A list of image files as a source."""

from pathlib import Path

import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage
from dino_jax.data.sources.files import Files, natural_order


def test_files_in_the_given_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b.png", "a.png")]
    for i, path in enumerate(paths):
        Image.new("L", (1 + i, 1)).save(path)
    files = Files("two files", [*paths, tmp_path / "none.png"])
    assert (len(files), files.spec, files.class_names) == (3, "two files", None)
    for i, path in enumerate(paths):
        assert (files.name(i), files.label(i)) == (str(path), -1)
        with files.image(i) as image:
            assert image.width == 1 + i
    with pytest.raises(UnreadableImage):
        files.image(2)


def test_names_are_sorted_by_their_numbers() -> None:
    """Also with superscript digits, which are not numbers, and digits of other scripts."""
    names = ["10/a", "9", "b²", "b10²", "b9²", "b٣", "a", "9/a"]
    expected = ["9", "9/a", "10/a", "a", "b٣", "b9²", "b10²", "b²"]
    assert sorted(names, key=natural_order) == expected
