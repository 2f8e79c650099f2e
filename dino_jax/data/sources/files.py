"""Image files by their paths, in a given order and without classes, as a source."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dino_jax.data.decode import open_image


class Files:
    """The files of a list; `spec` is what messages call it."""

    class_names = None
    labels = None

    def __init__(self, spec: str, paths: Sequence[Path]) -> None:
        self.spec = spec
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return open_image(self._paths[index])

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def stamp(self, index: int) -> str:
        return file_stamp(self._paths[index])


def natural_order(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them: frame 10 behind frame 9."""
    # Texts and numbers in turns; "²" is a digit to `isdigit`, but no number to `int`.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def file_stamp(path: str | Path) -> str:
    """A file's absolute path, size and time of change: as long as it is the same, so are they."""
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError:  # a picture that cannot be read, as the log will say
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"
