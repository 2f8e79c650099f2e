"""`folder:/path[@SPLIT]`: image files in a folder, at any depth."""

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import EXTENSIONS, open_image, read_file
from dino_jax.data.sources.files import file_stamp
from dino_jax.data.sources.names import Names
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError, listed
from dino_jax.paths import local_path
from dino_jax.text import printable, same_class

# Folders that operating systems and NAS devices create; hidden ones start with a dot.
SYSTEM_FOLDERS = {
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "recycler",
    "system volume information",
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


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

    @property
    def root(self) -> str:
        return os.fsdecode(self._root)

    def image_folders(self) -> list[str]:
        """The folders that contain images."""
        relative = {path.rpartition(b"/")[0] for path in self._paths}  # on bytes, which is fast
        return [os.fsdecode(os.path.join(self._root, path)) for path in relative]

    @property
    def folders(self) -> tuple["FolderSource", ...]:
        """The folders that were searched for images."""
        return (self,)

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


def check_apart(source: Source, folder: Path, argument: str) -> None:
    """Rejects an output folder that holds images of a source: the outputs would become images.

    Other folders inside a data folder are fine: those with results are not searched for images.

    Args:
      source: any source; only folders that were searched for images can conflict.
      folder: the output folder; may be missing.
      argument: its name in the message.
    Raises:
      UsageError: the folder is the root of the source, or images of the source are below it.
    """
    target = os.path.realpath(folder)
    for searched in getattr(source, "folders", ()):
        root = os.path.realpath(searched.root)
        if target == root or (
            not _is_inside(root, target)
            and any(_is_inside(os.path.realpath(path), target) for path in searched.image_folders())
        ):
            raise UsageError(
                f"{argument}={printable(str(folder))} contains images of {searched.spec}: choose "
                "a folder without images"
            )


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def image_paths(root: str) -> Iterator[str]:
    """Yields paths relative to `root`: a folder's files in sorted order, then its sub-folders.

    Only directory entries are read, not the files. Links to folders are followed, except into a
    folder that contains the link. Hidden and system folders are skipped, and so are folders with
    the results of a run or job. What else is skipped is logged in one line.

    Raises:
      UsageError: the root cannot be listed.
    """
    skipped: Counter[str] = Counter()
    unreadable, written = [], []
    pending = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            with os.scandir(path) as scan:
                listing = _Listing(scan)
        except OSError as error:
            # Other errors, such as those of a network file system, must not change the data set.
            if not (folder and isinstance(error, PermissionError)):
                raise UsageError(f"cannot list the folder {path}: {error.strerror}") from error
            unreadable.append(f"{printable(path)} ({error.strerror})")
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        if folder and listing.is_output(path):
            written.append(printable(path))
            continue
        skipped += listing.skipped
        for name in listing.images:
            yield os.path.join(folder, name)
        inside = ancestors | {identity}
        pending.extend((os.path.join(folder, name), inside) for name in reversed(listing.folders))
    if skipped:
        most = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        counts = listed((f"{count} {extension}" for extension, count in most), limit=10)
        logging.warning("%s: files skipped, as they are not images: %s", printable(root), counts)
    if unreadable:
        logging.warning(
            "%s: skipped %d folders that cannot be listed: %s",
            printable(root),
            len(unreadable),
            listed(unreadable),
        )
    if written:
        name = printable(root)
        logging.warning("%s: skipped the results of a run or job in %s", name, listed(written))


class _Listing:
    """The sorted names in a folder; a million `DirEntry` would take more memory."""

    def __init__(self, entries: Iterator[os.DirEntry]) -> None:
        self.folders: list[str] = []
        self.images: list[str] = []
        self.skipped: Counter[str] = Counter()  # other files, by extension
        self._marks: set[str] = set()
        for entry in entries:
            name, lower = entry.name, entry.name.lower()
            if name in _MARKS:
                self._marks.add(name)
            if name.startswith(".") or lower in SYSTEM_FOLDERS | SYSTEM_FILES:
                continue
            # For a link to itself `is_dir` raises, while `isdir` returns False.
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                self.folders.append(name)
            elif lower.endswith(EXTENSIONS):
                self.images.append(name)
            else:
                self.skipped[printable(os.path.splitext(lower)[1]) or "without extension"] += 1
        self.folders.sort()
        self.images.sort()

    def is_output(self, path: str) -> bool:
        """Whether the folder contains a run, or the results of a job."""
        logs = self._marks & {"log.txt", "metrics.jsonl"}
        if "checkpoints" in self._marks and (logs or ".lock" in self._marks):
            return True
        if "results.json" not in self._marks or not os.path.isfile(f"{path}/results.json"):
            return False
        try:
            with open(os.path.join(path, "results.json"), "rb") as file:
                return b'"job":' in file.read(100)
        except OSError:
            return False


_MARKS = {".lock", "checkpoints", "log.txt", "metrics.jsonl", "results.json"}


def _classes(paths: Names) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """Class names and [len] int32 classes by first-level sub-folder, or (None, None)."""
    folders: dict[bytes, bytes] = {}  # a class name in NFC for each folder name
    number: dict[bytes, int] = {}
    classes = array("i")
    for path in paths:
        top, _, rest = path.partition(os.fsencode(os.sep))
        if top not in folders:
            folders[top] = os.fsencode(same_class(os.fsdecode(top)))
        classes.append(number.setdefault(folders[top], len(number)) if rest else -1)
    if min(classes) < 0:
        return None, None
    names = sorted(number)
    rank = np.empty(len(names), np.int32)
    rank[[number[name] for name in names]] = np.arange(len(names))
    return tuple(os.fsdecode(name) for name in names), rank[classes]
