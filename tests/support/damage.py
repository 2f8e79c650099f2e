"""Damages files, for tests of readers."""

from collections.abc import Callable
from pathlib import Path


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Returns a function that changes the content of the file `name` in a folder."""
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))
