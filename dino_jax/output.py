"""Atomic file writes, and early checks of output paths."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_jax.errors import UsageError


def check_writable(path: Path, argument: str = "output") -> None:
    """Checks that a file can be written, and creates its folder.

    Args:
      path: the file.
      argument: the name of the argument, for the message.
    Raises:
      UsageError: the file cannot be written.
    """
    check_folder(path.parent, argument)
    try:
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise UsageError(
            f"{argument}={path} cannot be written ({error.strerror}): choose another file"
        ) from error


def check_folder(path: Path, argument: str) -> None:
    """Creates a folder if it is missing, and checks that files can be written to it.

    Args:
      path: the folder.
      argument: the name of the argument, for the message.
    Raises:
      UsageError: files cannot be written to the folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(
            f"{argument}: folder {path} cannot be written to ({error.strerror}): choose another"
        ) from error


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the same extension, and renames it to `path` on success.

    If `path` is a device or a pipe, it is yielded itself, because a file must not replace it.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_earlier(folder: Path, pattern: str) -> None:
    """Removes the files that an earlier run of the same job has written to a folder.

    Args:
      folder: the folder; may be missing.
      pattern: a regular expression that matches exactly the file names that the job writes.
    """
    for path in folder.glob("*"):
        if re.fullmatch(pattern, path.name):
            path.unlink()
