"""The learning curve of a run, drawn from its log files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dino_jax.errors import UsageError
from dino_jax.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPOCHS_FILE, INTERVALS_FILE = "log.txt", "metrics.jsonl"
POSITION = {EPOCHS_FILE: ("epoch",), INTERVALS_FILE: ("step", "epoch")}  # keys of every record
PANELS = {  # metric: its axis label
    "loss": "loss (nats)",
    "lr": "learning rate",
    "teacher_entropy_over_log_k": "teacher entropy / ln K",
    "kl": "KL(teacher || student) (nats)",
    "prototypes_in_use": "prototypes in use",
}


def plot_learning_curve(workdir: Path) -> Path:
    """Draws the learning curve of a run, finished or not, from its log files.

    Draws one panel for k-NN and one for each metric in `PANELS`, if they were logged.

    Args:
      workdir: the run's folder.
    Returns: the path of the picture, `learning_curve.png` in the same folder.
    Raises:
      UsageError: both log files are missing or empty, or a line is invalid.
    """
    from matplotlib.figure import Figure  # here, because it is slow to import

    epochs, intervals = read_records(workdir / EPOCHS_FILE), read_records(workdir / INTERVALS_FILE)
    recorded = {name for record in epochs + intervals for name in record}
    if not recorded:
        raise UsageError(
            f"workdir={workdir} has no records in {EPOCHS_FILE} or {INTERVALS_FILE}: "
            "use the folder of a run that has trained for at least one interval"
        )
    panels = [name for name in PANELS if recorded & {name, f"train_{name}"}]
    ks = sorted({int(name.split("_")[1]) for name in recorded if name.startswith("knn_")})
    count = len(panels) + bool(ks)
    columns = count if count < 4 else -(-count // 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(printable(workdir.resolve().name), parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis, name in zip(axes, panels, strict=False):
        axis.set_ylabel(PANELS[name])
        faint = 0.4 if f"train_{name}" in recorded else 1.0
        _draw(axis, intervals, name, 0, color="tab:blue", alpha=faint, label="interval")
        _draw(axis, epochs, f"train_{name}", 0.5, color="tab:blue", label="mean of the epoch")
    # k-NN is scored at the end of an epoch.
    ends = [record | {"epoch": record["epoch"] + 1} for record in epochs]
    timeline = sorted(intervals + ends, key=lambda record: record["epoch"])
    for k in ks:
        axes[count - 1].set_ylabel("k-NN top-1 (%)")
        _draw(axes[count - 1], timeline, f"knn_{k}_top1", 0, label=f"k = {k}")
    for axis in axes[:count]:
        axis.set_xlabel("epoch")
        axis.set_xlim(0, 1.02 * timeline[-1]["epoch"] or 1)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="y", scilimits=(-2, 5))
        if not any(np.isfinite(line.get_ydata()).any() for line in axis.lines):
            axis.set_yticks([])
            axis.text(0.5, 0.5, "no finite value", ha="center", transform=axis.transAxes)
    for axis in {axes[0], axes[count - 1]} if ks else {axes[0]}:
        axis.legend(frameon=False)
    path = workdir / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path


def _draw(axis: "Axes", records: list[dict], name: str, shift: float, **style: object) -> None:
    """Draws a metric over the epochs, with markers if there are few points, and gaps for nulls."""
    logged = [record for record in records if name in record]
    epochs = [record["epoch"] + shift for record in logged]
    values = np.array([record[name] for record in logged], np.float64)  # null becomes NaN
    axis.plot(epochs, values, marker="o" if len(logged) <= 30 else None, markersize=3, **style)


def read_records(path: Path) -> list[dict]:
    """Reads the records of a log file; empty if the file is missing.

    Args:
      path: a file whose name is a key of `POSITION`.
    Raises:
      UsageError: a line is not JSON, or lacks a key of `POSITION`.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UsageError(
                    f"{path}, line {number} is not JSON ({error}): fix or delete the line"
                ) from error
            # Left by a run that was killed while writing it. The resumed run rewrites it.
            continue
        for key in POSITION[path.name]:
            if not (isinstance(record, dict) and isinstance(record.get(key), int | float)):
                raise UsageError(
                    f"{path}, line {number} must contain a number {key!r}, like every line that a "
                    "run logs: fix or delete the line"
                )
        records.append(record)
    return records
