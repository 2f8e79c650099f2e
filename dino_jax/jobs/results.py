"""The end of a job: a table on the console, and `results.json`."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from dino_jax import __version__
from dino_jax.output import whole_or_nothing
from dino_jax.text import printable
from dino_jax.weights.info import WeightsInfo

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")


def report(
    path: Path,
    job: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    info: WeightsInfo | None,
    *,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[object]] = (),
    notes: Sequence[str] = (),
    unreadable: Mapping[str, int] | None = None,
) -> None:
    """Prints the results of a job and writes them to a file, on the first process only.

    Args:
      path: of the JSON file.
      job: name of the job.
      metrics: its results.
      settings: its arguments.
      info: of the weights.
      header: of the table to print.
      rows: of the table; no table is printed without rows.
      notes: lines to print below the table.
      unreadable: number of unreadable images that were skipped, by source.
    """
    if jax.process_index() > 0:
        return
    if rows:
        print(table(header, rows))
    for note in notes:
        print(note)
    for spec, count in (unreadable or {}).items():
        if count:
            print(f"unreadable images of {spec}, skipped: {count}")
    write_results(path, job, metrics, settings, info)


def write_results(
    path: Path,
    job: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    info: WeightsInfo | None,
) -> None:
    """Writes the results of a job with everything that is needed to reproduce them.

    The file is replaced atomically.

    Args:
      path: of the JSON file.
      job: name of the job.
      metrics: its results.
      settings: its arguments.
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


def versions() -> dict[str, str]:
    """Versions of Python and the packages that affect results, and the kind of device."""
    found = {name: version(name) for name in PACKAGES}
    here = {"device": jax.devices()[0].device_kind, "python": platform.python_version()}
    return here | {"dino_jax": __version__} | found


def table(header: Sequence[str], rows: Sequence[Sequence[object]], align: str = ">") -> str:
    """Formats columns for the console, aligned to the right (">") or the left ("<")."""
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{c:{align}{w}}" for c, w in zip(r, widths, strict=True)) for r in cells]
    return "\n".join(line.rstrip() for line in lines)
