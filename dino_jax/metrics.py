"""What a run writes while it trains: log files, TensorBoard, the console and a learning curve.

In the run's folder (workdir):
  `log.txt`             a JSON object per epoch: train_loss, train_lr, train_wd, further train_*
                        metrics, epoch, knn_* scores; no times, so equal runs give equal files.
  `metrics.jsonl`       a JSON object per interval: step, epoch (fractional), metrics, speed.
  `tensorboard/`        the scalars of both.
  `learning_curve.png`  drawn from the two files.
A number that is not finite is written as null, since JSON has no other way to say it.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from os import fsync
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

import jax
import numpy as np
from tqdm import tqdm

from dino_jax.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPOCHS_FILE, INTERVALS_FILE = "log.txt", "metrics.jsonl"
PLAIN_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
PANELS = {  # metric -> label of its axis in the learning curve
    "loss": "loss (nats)",
    "lr": "learning rate",
    "teacher_entropy_over_log_k": "teacher entropy / ln K",
    "kl": "KL(teacher || student) (nats)",
    "prototypes_in_use": "prototypes in use",
}


class RunLog:
    """The log of a run, as a context manager.

    Entered at step s, it first drops what a former run in the same folder wrote about later steps,
    since that will be written again. Leaving it draws the learning curve.

    Args:
      workdir: the run's folder; made if missing.
      resume_step: optimizer steps already taken, 0 for a new run.
      steps_per_epoch: optimizer steps in an epoch.
      total_steps: of the whole run.
      batch_size: images per step over all devices.
      is_main: whether this process writes; on the others every call does nothing.
    Raises: UsageError on entering, where a log file holds a line that no run wrote.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        steps_per_epoch: int,
        total_steps: int,
        batch_size: int,
        is_main: bool = True,
    ) -> None:
        self.workdir = workdir
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.is_main = is_main
        self._step = resume_step
        self._bar: tqdm | None = None
        self._next_plain_line = time.monotonic()

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        from tensorboardX import SummaryWriter  # here: it imports torch where that is installed

        start, done = self._step, self._step // self.steps_per_epoch
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._epochs = _reopen(self.workdir / EPOCHS_FILE, lambda r: r["epoch"] < done)
        # A run from step 0 also repeats the scores of the untrained network.
        self._intervals = _reopen(self.workdir / INTERVALS_FILE, lambda r: r["step"] <= start > 0)
        self._tensorboard = SummaryWriter(
            str(self.workdir / "tensorboard"), purge_step=start + 1, flush_secs=30
        )
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total_steps,
                initial=start,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.close()
        written = self._epochs.tell() + self._intervals.tell()
        self._epochs.close()
        self._intervals.close()
        self._tensorboard.close()
        if written:
            plot_learning_curve(self.workdir)

    def interval(
        self, step: int, metrics: Mapping[str, float], *, seconds: float, data_seconds: float
    ) -> None:
        """Records the steps since the last call.

        Args:
          step: optimizer steps taken so far; more than at the last call.
          metrics: loss, lr and any others; Python, NumPy or JAX scalars.
          seconds: wall time of these steps.
          data_seconds: the part of it that the loop waited for batches.
        """
        if not self.is_main:
            return
        steps = step - self._step
        self._step = step
        values = {name: float(value) for name, value in metrics.items()}
        speed = {
            "images_per_second": steps * self.batch_size / seconds,
            "data_wait": data_seconds / seconds,
            "seconds": seconds,
        } | _peak_device_memory()
        self._write_interval(step, values | speed)
        self._add_scalars("train", values, step)
        self._add_scalars("speed", speed, step)
        self._show(values, speed, eta=(self.total_steps - step) * seconds / steps)

    def epoch(
        self,
        epoch: int,
        metrics: Mapping[str, float],
        knn: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Records a finished epoch.

        Do not reorder: call it before the checkpoint of the epoch's last step is saved. A run that
        resumes from that checkpoint keeps this line and does not write it again.

        Args:
          epoch: counted from 0.
          metrics: loss, lr, weight_decay and any others, means over the epoch, without times.
          knn: the table of `evaluate.knn.knn_accuracy`, where the epoch ended with one.
        """
        if not self.is_main:
            return
        names = {"weight_decay": "wd"}  # as in the reference's log
        values = {f"train_{names.get(n, n)}": float(value) for n, value in metrics.items()}
        scores = _knn_columns(knn or {})
        self._epochs.write(_line(values | {"epoch": epoch} | scores))
        self._add_scalars("epoch", values | scores, (epoch + 1) * self.steps_per_epoch)
        loss = f"loss {values['train_loss']:.4f}"
        self.message(f"epoch {epoch + 1} finished  {loss}{_knn_text(knn or {})}")

    def scores(self, step: int, knn: Mapping[int, Mapping[str, float]]) -> None:
        """Records k-NN scores between epochs, such as those of the untrained network at step 0."""
        if not self.is_main:
            return
        values = _knn_columns(knn)
        self._write_interval(step, values)
        self._add_scalars("epoch", values, step)
        self.message(f"step {step}{_knn_text(knn)}")

    def message(self, text: str) -> None:
        """Shows a line to the user, above the progress bar where there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def _write_interval(self, step: int, values: Mapping[str, float]) -> None:
        position = {"step": step, "epoch": step / self.steps_per_epoch}
        self._intervals.write(_line(position | values))

    def _show(self, values: Mapping[str, float], speed: Mapping[str, float], eta: float) -> None:
        epochs = self.total_steps / self.steps_per_epoch
        memory = speed.get("device_memory_gib")  # not known on CPU
        parts = [
            f"epoch {self._step / self.steps_per_epoch:.2f}/{epochs:.4g}",
            f"ETA {tqdm.format_interval(eta)}",  # early: a narrow terminal cuts the line's end
            f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"{speed['images_per_second']:,.0f} images/s",
            f"data wait {speed['data_wait']:.0%}",
            *([] if memory is None else [f"{memory:.1f} GiB"]),
        ]
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_description_str("  ".join(parts))
        elif time.monotonic() >= self._next_plain_line or self._step == self.total_steps:
            self._next_plain_line = time.monotonic() + PLAIN_LINE_SECONDS
            self.message("  ".join(parts))

    def _add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(f"{group}/{name}", value, step)


def plot_learning_curve(workdir: Path) -> Path:
    """Draws the learning curve of any run, finished or not, from its log files.

    There is a panel for k-NN and for each metric of `PANELS`, where the files hold it.

    Args:
      workdir: the run's folder.
    Returns: the path of the picture, `learning_curve.png` in the same folder.
    Raises: UsageError where neither log file has a line.
    """
    from matplotlib.figure import Figure  # here: too slow for commands that draw nothing

    epochs, intervals = _read(workdir / EPOCHS_FILE), _read(workdir / INTERVALS_FILE)
    recorded = {name for record in epochs + intervals for name in record}
    if not recorded:
        raise UsageError(
            f"workdir={workdir} has no line in {EPOCHS_FILE} or {INTERVALS_FILE}; "
            "give the folder of a run that has trained for at least one interval"
        )
    panels = [name for name in PANELS if recorded & {name, f"train_{name}"}]
    ks = sorted({int(name.split("_")[1]) for name in recorded if name.startswith("knn_")})
    count = len(panels) + bool(ks)
    columns = count if count < 4 else -(-count // 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(workdir.resolve().name)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis, name in zip(axes, panels, strict=False):
        axis.set_ylabel(PANELS[name])
        faint = 0.4 if f"train_{name}" in recorded else 1.0
        _draw(axis, intervals, name, 0, color="tab:blue", alpha=faint, label="interval")
        _draw(axis, epochs, f"train_{name}", 0.5, color="tab:blue", label="mean of the epoch")
    ends = [record | {"epoch": record["epoch"] + 1} for record in epochs]  # k-NN comes then
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
    """A line over the epochs, points too where they are few; a gap where a number is null."""
    held = [record for record in records if name in record]
    epochs = [record["epoch"] + shift for record in held]
    values = np.array([record[name] for record in held], np.float64)  # null becomes NaN
    axis.plot(epochs, values, marker="o" if len(held) <= 30 else None, markersize=3, **style)


def _knn_columns(knn: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {f"knn_{k}_{name}": float(row[name]) for k, row in knn.items() for name in row}


def _knn_text(knn: Mapping[int, Mapping[str, float]]) -> str:
    return "".join(f"  k-NN (k={k}) {row['top1']:.1f} %" for k, row in knn.items())


def _line(record: Mapping[str, float | None]) -> str:
    finite = {n: v if v is None or math.isfinite(v) else None for n, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _read(path: Path) -> list[dict]:
    """The records of a log file; of a missing one none."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UsageError(
                    f"{path}, line {number} is not JSON ({error}); mend the line or delete it"
                ) from error
            # A run that was killed while writing leaves half a line, which it will write again.
    return records


def _reopen(path: Path, keep: Callable[[dict], bool]) -> TextIO:
    """Opens a log file to append to, without the records that are not to be kept."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(_line(record) for record in _read(path) if keep(record))
        file.flush()
        fsync(file.fileno())
    temporary.replace(path)
    return path.open("a", buffering=1)  # flushed at every line


def _peak_device_memory() -> dict[str, float]:
    """`device_memory_gib` of the fullest local device; empty where the backend does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s]
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}
