"""What a job says: a table on the console and `results.json`."""

import dataclasses
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from dino_jax import __version__
from dino_jax.errors import UsageError
from dino_jax.weights.load import WeightsInfo

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes, and the kind of device."""
    found = {name: version(name) for name in PACKAGES}
    here = {"device": jax.devices()[0].device_kind, "python": platform.python_version()}
    return here | {"dino_jax": __version__} | found


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


def write_results(
    path: Path,
    job: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    info: WeightsInfo | None,
) -> None:
    """Writes a job's result with all that is needed to get it again.

    An earlier result is replaced when this one is whole.

    Args:
      path: of the JSON file.
      job: its name.
      metrics: the numbers.
      settings: the job's arguments.
      info: of the weights.
    """
    record = {
        "job": job,
        "metrics": metrics,
        "settings": settings,
        "weights": info and dataclasses.asdict(info),
        "versions": versions(),
    }
    with whole_or_nothing(path) as part:
        part.write_text(json.dumps(record, indent=2, default=str) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]], align: str = ">") -> str:
    """Columns for the console, aligned to the right (">") or the left ("<")."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{c:{align}{w}}" for c, w in zip(r, widths, strict=True)) for r in cells]
    return "\n".join(line.rstrip() for line in lines)


def print_unreadable(counts: Mapping[str, int]) -> None:
    """Says how many images were left out; the log has named each."""
    for spec, count in counts.items():
        if count:
            print(f"images of {spec} that cannot be read and were left out: {count}")
