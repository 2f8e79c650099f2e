"""A list of image files, in a given order and without classes, as a source."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dino_jax.data.decode import open_image


class Files:
    """Image files without classes; `spec` is their name in messages."""

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
    """Sort key that compares numbers in names by value: frame 9 comes before frame 10."""
    # Text and numbers alternate. `isdigit` would accept "²", which `int` rejects.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def file_stamp(path: str | Path) -> str:
    """A file's absolute path, size and modification time: it changes when the file changes."""
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError:  # an unreadable image; reading it logs the reason
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"
