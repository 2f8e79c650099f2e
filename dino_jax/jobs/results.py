"""What a job says: a table on the console and `results.json`."""

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
from dino_jax.weights.info import WeightsInfo

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes, and the kind of device."""
    found = {name: version(name) for name in PACKAGES}
    here = {"device": jax.devices()[0].device_kind, "python": platform.python_version()}
    return here | {"dino_jax": __version__} | found


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
