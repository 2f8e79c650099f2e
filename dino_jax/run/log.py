"""What a run writes while it trains: log files, TensorBoard, the console and a learning curve.

In the run's folder (workdir):
  `log.txt`             a JSON object per epoch: train_loss, train_lr, train_wd, further train_*
                        metrics, epoch, knn_* scores; no times, so equal runs give equal files.
  `metrics.jsonl`       a JSON object per interval: step, epoch (fractional), metrics, speed.
  `tensorboard/`        the scalars of both.
  `learning_curve.png`  drawn from the two files.
A number that is not finite is written as null, since JSON has no other way to say it.
"""

import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import fsync
from pathlib import Path
from typing import Self, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dino_jax.run.learning_curve import (
    EPOCHS_FILE,
    INTERVALS_FILE,
    plot_learning_curve,
    read_records,
)
from dino_jax.run.tensorboard import ScalarWriter

PLAIN_LINE_SECONDS = 10.0  # between progress lines where there is no terminal


class RunLog:
    """The log of a run, as a context manager.

    Entered at step s, it first drops what a former run in the same folder wrote about later steps,
    since that will be written again. A new run sets the logs of one that finished an epoch there
    aside, as `log.txt.1` and `metrics.jsonl.1`. Leaving it draws the learning curve.

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
        self._planned: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._next_plain_line = time.monotonic()
        self._first_interval: tuple[float, int] | None = None  # when it began, after which step

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        start = self._step
        done = start // self.steps_per_epoch
        self.workdir.mkdir(parents=True, exist_ok=True)
        set_aside = [] if start else _set_aside(self.workdir)
        with ExitStack() as opened:  # closes the first ones where another cannot be opened
            self._epochs = opened.enter_context(
                _reopen(self.workdir / EPOCHS_FILE, lambda r: r["epoch"] < done)
            )
            # A run from step 0 also repeats the scores of the untrained network.
            self._intervals = opened.enter_context(
                _reopen(self.workdir / INTERVALS_FILE, lambda r: r["step"] <= start > 0)
            )
            self._tensorboard = opened.enter_context(
                ScalarWriter(self.workdir / "tensorboard", purge_step=start + 1 if start else 0)
            )
            if sys.stderr.isatty():
                self._bar = opened.enter_context(
                    tqdm(
                        total=self.total_steps,
                        initial=start,
                        dynamic_ncols=True,
                        bar_format="|{bar}| {desc}",
                    )
                )
                opened.enter_context(logging_redirect_tqdm())  # warnings go above the bar
            self._opened = opened.pop_all()
        if set_aside:
            self.message(f"the logs of a former run are now {' and '.join(map(str, set_aside))}")
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_main:
            return
        written = self._epochs.tell() + self._intervals.tell()
        self._opened.close()
        if written:
            try:
                plot_learning_curve(self.workdir)
            except OSError as error:  # must not hide why the run ends
                logging.warning("the learning curve cannot be written: %s", error)

    def interval(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        seconds: float,
        data_seconds: float,
        health: str = "",
    ) -> None:
        """Records the steps since the last call.

        Args:
          step: optimizer steps taken so far; more than at the last call.
          metrics: loss, lr and any others; Python, NumPy or JAX scalars.
          seconds: wall time of these steps.
          data_seconds: the part of it that the loop waited for batches.
          health: the kind of the verdict on the run's health.
        """
        if not self.is_main:
            return
        now, steps = time.monotonic(), step - self._step
        if self._first_interval is None:
            self._first_interval = now - seconds, self._step
        begun, begun_step = self._first_interval
        self._step = step
        values = {name: float(value) for name, value in metrics.items()}
        speed = {
            "images_per_second": steps * self.batch_size / seconds,
            "data_wait": data_seconds / seconds,
            "seconds": seconds,
        }
        speed |= self._planned | _peak_device_memory()
        self._write_interval(step, values | speed | ({"health": health} if health else {}))
        self._tensorboard.write("train", values, step)
        self._tensorboard.write("speed", speed, step)
        # Checkpoints and scores between intervals take time, too.
        eta = (self.total_steps - step) * (now - begun) / (step - begun_step)
        self._show(values, speed, eta)

    def epoch(
        self,
        epoch: int,
        metrics: Mapping[str, float],
        knn: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Records a finished epoch.

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
        self._tensorboard.write("epoch", values | scores, (epoch + 1) * self.steps_per_epoch)
        self._epochs.write(_line(values | {"epoch": epoch} | scores))
        loss = f"loss {values['train_loss']:.4f}"
        self.message(f"epoch {epoch + 1} finished  {loss}{_knn_text(knn or {})}")

    def scores(self, step: int, knn: Mapping[int, Mapping[str, float]]) -> None:
        """Records k-NN scores between epochs, such as those of the untrained network at step 0."""
        if not self.is_main:
            return
        values = _knn_columns(knn)
        self._write_interval(step, values)
        self._tensorboard.write("epoch", values, step)
        self.message(f"step {step}{_knn_text(knn)}")

    def note_memory(self, planned: int) -> None:
        """Takes note of the bytes that a run is to take of a device; intervals record them."""
        self._planned = {"planned_memory_gib": planned / 2**30}

    def message(self, text: str) -> None:
        """Shows a line to the user, above the progress bar where there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def _write_interval(self, step: int, values: Mapping[str, float | str]) -> None:
        position = {"step": step, "epoch": step / self.steps_per_epoch}
        self._intervals.write(_line(position | values))

    def _show(self, values: Mapping[str, float], speed: Mapping[str, float], eta: float) -> None:
        epochs = self.total_steps / self.steps_per_epoch
        memory = speed.get("device_memory_gib")  # not known on CPU
        parts = [  # short enough for a bar before them in 80 columns
            f"epoch {self._step / self.steps_per_epoch:.2f}/{epochs:.4g}",
            f"loss {values['loss']:.3f}",
            f"lr {values['lr']:.1e}",
            f"{speed['images_per_second']:.0f} images/s",
            f"wait {speed['data_wait']:.0%}",
            *([] if memory is None else [f"{memory:.1f} GiB"]),
            f"ETA {tqdm.format_interval(eta)}",
        ]
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_description_str(" ".join(parts))
        elif time.monotonic() >= self._next_plain_line or self._step == self.total_steps:
            self._next_plain_line = time.monotonic() + PLAIN_LINE_SECONDS
            self.message("  ".join(parts))


def is_logged(workdir: Path, epoch: int) -> bool:
    """Whether a run's log has the line of this epoch, or of a later one.

    The first process looks, and all hosts learn what it saw, since it may soon write.
    """
    is_main = jax.process_index() == 0
    logged = is_main and any(r["epoch"] >= epoch for r in read_records(workdir / EPOCHS_FILE))
    return bool(multihost_utils.broadcast_one_to_all(np.int32(logged)))


def _knn_columns(knn: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {f"knn_{k}_{name}": float(row[name]) for k, row in knn.items() for name in row}


def _knn_text(knn: Mapping[int, Mapping[str, float]]) -> str:
    return "".join(f"  k-NN (k={k}) {row['top1']:.1f} %" for k, row in knn.items())


def _line(record: Mapping[str, float | str | None]) -> str:
    def is_writable(value: float | str | None) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    finite = {name: value if is_writable(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _set_aside(workdir: Path) -> list[Path]:
    """Renames the logs of a run that finished an epoch; their new names, where there are any.

    What a run wrote that did not come so far is dropped: it is most often the same run, killed
    before its first checkpoint.
    """
    paths = [workdir / EPOCHS_FILE, workdir / INTERVALS_FILE]
    if not (paths[0].exists() and paths[0].stat().st_size):
        return []
    taken = lambda number: any(Path(f"{path}.{number}").exists() for path in paths)  # noqa: E731
    number = next(number for number in itertools.count(1) if not taken(number))
    return [path.replace(f"{path}.{number}") for path in paths if path.exists()]


def _reopen(path: Path, keep: Callable[[dict], bool]) -> TextIO:
    """Opens a log file to append to, without the records that are not to be kept."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(_line(record) for record in read_records(path) if keep(record))
        file.flush()
        fsync(file.fileno())
    temporary.replace(path)
    return path.open("a", buffering=1)  # flushed at every line


def _peak_device_memory() -> dict[str, float]:
    """`device_memory_gib` of the fullest local device; empty where the backend does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s]
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}
