"""`folder:/path[@SPLIT]`: image files in a folder, at any depth."""

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import open_image, read_file
from dino_jax.data.sources.files import file_stamp
from dino_jax.data.sources.names import Names
from dino_jax.errors import UsageError
from dino_jax.paths import local_path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource:
    """Image files below a folder, in an order that does not depend on the file system.

    An image's class is its first-level sub-folder; classes are numbered in sorted order. If any
    image is outside a sub-folder, the source has no classes.
    """

    def __init__(self, root: Path, spec: str) -> None:
        self.spec = spec
        self._root = os.fsencode(root)
        self._paths = Names.of(map(os.fsencode, image_paths(str(root))))
        if not self._paths:
            raise UsageError(
                f"source {spec!r}: no images in {root} or its sub-folders; "
                f"file names must end in {', '.join(EXTENSIONS)} (lower or upper case)"
            )
        self.class_names, self.labels = _classes(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return open_image(self.name(index))

    def encoded(self, index: int) -> bytes:
        return read_file(self.name(index))

    def label(self, index: int) -> int:
        return -1 if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._paths[index]))

    def stamp(self, index: int) -> str:
        return file_stamp(self.name(index))


def open_folder(location: str, split: str | None) -> FolderSource:
    """Opens `folder:location[@split]`, where the split is a sub-folder; see `open_source`."""
    root = local_path(location, "source")
    spec = f"folder:{location}" + (f"@{split}" if split else "")
    if not root.is_dir():
        raise UsageError(f"source {spec!r}: {root} is not a folder; check the path")
    if split:
        if not (root / split).is_dir():
            present = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
            raise UsageError(
                f"source {spec!r}: no sub-folder {split!r}; available sub-folders: {present}"
            )
        root = root / split
    return FolderSource(root, spec)


def image_paths(root: str) -> Iterator[str]:
    """Yields paths relative to `root`: a folder's files in sorted order, then its sub-folders.

    Only directory entries are read, not the files. Links to folders are followed, except into a
    folder that contains the link.
    """
    pending = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            with os.scandir(path) as scan:
                folders, files = _sorted_names(scan)
        except OSError as error:
            raise UsageError(f"cannot list the folder {path}: {error.strerror}") from error
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        for name in files:
            yield os.path.join(folder, name)
        inside = ancestors | {identity}
        pending.extend((os.path.join(folder, name), inside) for name in reversed(folders))


def _sorted_names(entries: Iterable[os.DirEntry]) -> tuple[list[str], list[str]]:
    """Names of sub-folders and of image files; a million `DirEntry` would take more memory."""
    folders, files = [], []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # For a link to itself `is_dir` raises, while `isdir` returns False.
        if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            files.append(entry.name)
    return sorted(folders), sorted(files)


def _classes(paths: Names) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """Class names and [len] int32 classes by first-level sub-folder, or (None, None)."""
    number: dict[bytes, int] = {}
    classes = array("i")
    for path in paths:
        top, _, rest = path.partition(os.fsencode(os.sep))
        classes.append(number.setdefault(top, len(number)) if rest else -1)
    if min(classes) < 0:
        return None, None
    names = sorted(number)
    rank = np.empty(len(names), np.int32)
    rank[[number[name] for name in names]] = np.arange(len(names))
    return tuple(os.fsdecode(name) for name in names), rank[classes]
