"""Files that are written whole or not at all, and folders checked before the work."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_jax.errors import UsageError


def check_writable(path: Path, argument: str = "output") -> None:
    """Finds out before the work whether its result can be written.

    Args:
      path: of the file.
      argument: that names it.
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
    """Makes a folder where there is none, and finds out whether it can be written into.

    Raises:
      UsageError: it cannot; `argument` is what names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(
            f"{argument}: the folder {path} cannot be written ({error.strerror}): give another one"
        ) from error


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Another name of the same ending to write to; it becomes the file's own when all went well.

    A device or a pipe is written as it is: it must not become a file.
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
    """Removes what the same job has left in a folder, so that it holds one run's files alone.

    Args:
      folder: may be missing.
      pattern: a regular expression of the names that the job writes, and of no others.
    """
    for path in folder.glob("*"):
        if re.fullmatch(pattern, path.name):
            path.unlink()
