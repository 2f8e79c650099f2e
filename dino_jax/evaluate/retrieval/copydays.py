"""INRIA Copydays on disk: originals, and manipulated copies in one folder per subset.

The copies of `original/200000.jpg` are `strong/200001.jpg`, ..., `jpegqual/75/200000.jpg`, ... and
`crops/10/200000.jpg`, ...: the first four characters of a name identify the picture.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np

from dino_jax.data.sources.files import Files, natural_order
from dino_jax.data.sources.folder import image_paths
from dino_jax.errors import UsageError, listed

ORIGINAL, STRONG = "original", "strong"
_PREFIX = 4  # characters that identify the picture


@dataclasses.dataclass(frozen=True)
class Copydays:
    """All files, subset after subset."""

    files: Files
    subsets: dict[str, slice]  # by folder, such as "crops/10"; the originals first
    pictures: np.ndarray  # [len(files)] str, the picture that each file was made from


def open_copydays(folder: Path) -> Copydays:
    """Opens the data set; reads no picture.

    Args:
      folder: contains `original`, `strong` and, optionally, other folders of copies.
    Raises:
      UsageError: originals or strong copies are missing, or a copy has no original.
    """
    found = defaultdict(list)
    for name in image_paths(str(folder)):
        if (subset := Path(name).parent.as_posix()) != ".":
            found[subset].append(folder / name)
    for name in (ORIGINAL, STRONG):
        if name not in found:
            raise UsageError(
                f"data={folder} has no images in {folder / name}: use the folder of Copydays, "
                "with original, strong and, optionally, jpegqual and crops"
            )
    originals = {path.name[:_PREFIX] for path in found[ORIGINAL]}
    paths: list[Path] = []
    subsets = {}
    for name in sorted(found, key=_order):
        _check_originals(found[name], originals)
        subsets[name] = slice(len(paths), len(paths) + len(found[name]))
        paths += found[name]
    pictures = np.array([path.name[:_PREFIX] for path in paths])
    return Copydays(Files(str(folder), paths), subsets, pictures)


def _check_originals(copies: list[Path], originals: set[str]) -> None:
    if orphans := [path.name for path in copies if path.name[:_PREFIX] not in originals]:
        raise UsageError(
            f"copies in {copies[0].parent} without an original: {listed(orphans)}; "
            f"the first {_PREFIX} characters of a name must be those of its original"
        )


def _order(name: str) -> tuple[bool, bool, list[str | int]]:
    """Originals, strong copies, then the others by name and number: crops/10 before crops/100."""
    return name != ORIGINAL, name != STRONG, natural_order(name)
