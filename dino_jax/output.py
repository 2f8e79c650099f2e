"""Atomic writes, and output paths that are checked before the work begins."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_jax.errors import UsageError


def check_writable(path: Path, argument: str = "output") -> None:
    """Checks that a file can be written; creates its folder.

    Args:
      path: of the file.
      argument: name of the argument, for the message.
    Raises:
      UsageError: it cannot.
    """
    check_folder(path.parent, argument)
    try:
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise UsageError(f"{argument}={path} cannot be written ({error.strerror})") from error


def check_folder(path: Path, argument: str) -> None:
    """Creates a folder if it is missing, and checks that files can be written to it.

    Args:
      path: of the folder.
      argument: name of the argument, for the message.
    Raises:
      UsageError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(
            f"{argument}: the folder {path} cannot be written ({error.strerror}): choose another"
        ) from error


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the same extension; renames it to `path` on success.

    A device or a pipe is yielded itself, as it must not be replaced by a file.
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
    """Removes the files that an earlier run of the same job left in a folder.

    Args:
      folder: may be missing.
      pattern: regular expression that matches the file names that the job writes, and no others.
    """
    for path in folder.glob("*"):
        if re.fullmatch(pattern, path.name):
            path.unlink()
