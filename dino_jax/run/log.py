"""The logs that a run writes while it trains.

Files in the run's folder (workdir):
  `log.txt`             a JSON object per epoch: train_loss, train_lr, train_wd, other train_*
                        metrics, epoch, knn_* scores. It contains no times, so equal runs write
                        equal files.
  `metrics.jsonl`       a JSON object per interval: step, epoch (fractional), metrics, speed.
  `tensorboard/`        the scalars of both files.
  `learning_curve.png`  drawn from both files.
NaN and infinities are written as null, because JSON cannot express them.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import fsync
from pathlib import Path
from typing import Self, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.run.console import Console
from dino_jax.run.learning_curve import (
    EPOCHS_FILE,
    INTERVALS_FILE,
    plot_learning_curve,
    read_records,
)
from dino_jax.run.tensorboard import ScalarWriter


class RunLog:
    """The log of a run, as a context manager.

    A resumed run first drops the records of steps after `resume_step`, which it will write again. A
    new run renames the logs of an earlier run in its folder to `log.txt.1` and `metrics.jsonl.1` if
    that run finished an epoch. The learning curve is drawn on exit.

    Args:
      workdir: the run's folder; created if missing.
      resume_step: optimizer steps already taken, 0 for a new run.
      steps_per_epoch: optimizer steps in an epoch.
      total_steps: optimizer steps of the whole run.
      batch_size: images per step on all devices together.
      is_main: whether this process writes; in other processes every call does nothing.
    Raises:
      UsageError: on entry, if a log file contains an invalid line.
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
        self._console = Console(
            start=resume_step, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )
        self._first_interval: tuple[float, int] | None = None  # its start: time and step

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        start = self._step
        done = start // self.steps_per_epoch
        self.workdir.mkdir(parents=True, exist_ok=True)
        rotated = [] if start else _rotate(self.workdir)
        with ExitStack() as opened:  # closes the open files if the next cannot be opened
            self._epochs = opened.enter_context(
                _reopen(self.workdir / EPOCHS_FILE, lambda r: r["epoch"] < done)
            )
            # A run from step 0 keeps nothing: it also scores the untrained network again.
            self._intervals = opened.enter_context(
                _reopen(self.workdir / INTERVALS_FILE, lambda r: r["step"] <= start > 0)
            )
            self._tensorboard = opened.enter_context(
                ScalarWriter(self.workdir / "tensorboard", purge_step=start + 1 if start else 0)
            )
            opened.enter_context(self._console)
            self._opened = opened.pop_all()
        if rotated:
            names = " and ".join(map(str, rotated))
            self.message(f"renamed the logs of an earlier run to {names}")
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_main:
            return
        written = self._epochs.tell() + self._intervals.tell()
        self._opened.close()
        if written:
            try:
                plot_learning_curve(self.workdir)
            except OSError as error:  # must not mask the exception that ended the run
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
          step: optimizer steps taken so far; more than in the last call.
          metrics: loss, lr and any others, as Python, NumPy or JAX scalars.
          seconds: wall time of these steps.
          data_seconds: the part of this time spent waiting for batches.
          health: the kind of health verdict, such as "starting".
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
        # From the wall time, which includes checkpoints and k-NN between intervals.
        eta = (self.total_steps - step) * (now - begun) / (step - begun_step)
        self._console.progress(step, values, speed, eta)

    def epoch(
        self,
        epoch: int,
        metrics: Mapping[str, float],
        knn: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Records a finished epoch.

        Args:
          epoch: counted from 0.
          metrics: means over the epoch of loss, lr, weight_decay and any others, but no times.
          knn: the result of `knn_accuracy`, if the epoch ended with one.
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

    def set_planned_memory(self, planned: int) -> None:
        """Adds the planned bytes per device to the records of all later intervals."""
        self._planned = {"planned_memory_gib": planned / 2**30}

    def message(self, text: str) -> None:
        """Prints a line."""
        if self.is_main:
            self._console.message(text)

    def _write_interval(self, step: int, values: Mapping[str, float | str]) -> None:
        position = {"step": step, "epoch": step / self.steps_per_epoch}
        self._intervals.write(_line(position | values))


def is_logged(workdir: Path, epoch: int) -> bool:
    """Whether a run's log contains this epoch or a later one.

    The first process reads the log and broadcasts the answer to all processes.
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


def _rotate(workdir: Path) -> list[Path]:
    """Renames the logs of an earlier run that finished an epoch. Returns the new paths.

    Logs without a finished epoch are overwritten: usually they are from the same run, killed before
    its first checkpoint.
    """
    paths = [workdir / EPOCHS_FILE, workdir / INTERVALS_FILE]
    if not (paths[0].exists() and paths[0].stat().st_size):
        return []
    taken = lambda number: any(Path(f"{path}.{number}").exists() for path in paths)  # noqa: E731
    number = next(number for number in itertools.count(1) if not taken(number))
    return [path.replace(f"{path}.{number}") for path in paths if path.exists()]


def _reopen(path: Path, keep: Callable[[dict], bool]) -> TextIO:
    """Drops all records for which `keep` is false, and opens the file for appending."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(_line(record) for record in read_records(path) if keep(record))
        file.flush()
        fsync(file.fileno())
    temporary.replace(path)
    return path.open("a", buffering=1)  # flushed after every line


def _peak_device_memory() -> dict[str, float]:
    """The highest `device_memory_gib` of the local devices; empty if the backend reports none."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s]
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}
