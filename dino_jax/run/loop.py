"""The training loop: runs the steps, and logs, saves and evaluates between them."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.errors import UsageError
from dino_jax.run.interrupt import StopRequest
from dino_jax.run.log import RunLog
from dino_jax.run.online_knn import Table
from dino_jax.training import health
from dino_jax.training.schedules import Schedule
from dino_jax.training.state import TrainState
from dino_jax.training.step import MAX_SKIPPED_IN_A_ROW, Batch

STEPS_AHEAD = 2  # steps that the host may dispatch before the device has finished them
SYNC_STEPS = 10  # maximum steps between two checks of several hosts whether to stop


class TrainingDiverged(RuntimeError):
    """Loss or gradients were not finite in several consecutive steps.

    The last checkpoint is intact.
    """


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often the loop logs, saves and evaluates."""

    steps_per_epoch: int
    total_steps: int
    log_every: int
    save_every: int  # 0: only at the end of each epoch
    knn_every_epochs: int  # 0: never

    @property
    def sync_every(self) -> tuple[int, int]:
        """At multiples of these steps, several hosts agree on whether to stop."""
        return min(self.log_every, SYNC_STEPS), self.steps_per_epoch

    def ends_with_knn(self, epoch: int) -> bool:
        """Whether k-NN scores follow this epoch, counted from 0. They always follow the last."""
        every = self.knn_every_epochs
        last = epoch + 1 == self.total_steps // self.steps_per_epoch
        return bool(every) and (last or (epoch + 1) % every == 0)


class IntervalClock:
    """Measures wall time and time spent waiting for data, interval by interval.

    Args:
      data_seconds: returns the total time spent waiting for data so far.
    """

    def __init__(self, data_seconds: Callable[[], float]) -> None:
        self._data_seconds = data_seconds
        self._start, self._waited = time.perf_counter(), data_seconds()

    def lap(self) -> tuple[float, float]:
        """Ends the interval and returns its (seconds, seconds spent waiting for data)."""
        start, waited = self._start, self._waited
        self._start, self._waited = time.perf_counter(), self._data_seconds()
        return self._start - start, self._waited - waited

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time spent in the `with` block from the interval."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


def train_loop(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], TrainState],
    batches: Iterator[Batch],
    *,
    data_seconds: Callable[[], float],
    start: int,
    has_unlogged_epoch: bool,
    cadence: Cadence,
    schedules: dict[str, Schedule],
    assess: Callable[..., health.Verdict],
    score: Callable[[TrainState], Table],
    log: RunLog,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the steps from `start` to the end, or until a stop is requested.

    The host dispatches steps ahead of the device, so that the device never waits for it: the
    metrics of an interval are fetched only after the next step is dispatched. The host is at most
    `STEPS_AHEAD` steps ahead, because every dispatched step keeps a batch in device memory.

    Args:
      state: the state after `start` steps; donated.
      step_fn: the compiled step.
      batches: the batches from step `start` on.
      data_seconds: returns the total time that `next(batches)` has waited.
      start: the number of steps already taken.
      has_unlogged_epoch: whether step `start` ends an epoch that is still missing from the log.
      cadence: when to log, save and evaluate.
      schedules: the schedules to log, by name.
      assess: maps (metrics, step=) to a health verdict.
      score: computes the teacher's k-NN scores.
      log: the run's log.
      checkpoints: the run's checkpoints.
      stop: requests that the loop saves and ends after the current step.
    Returns: (state, result). The result contains the last {step, metrics, health, knn}, without
      those that were never computed.
    Raises:
      TrainingDiverged: too many consecutive steps were not finite. Nothing was saved since.
      UsageError, OSError: the data cannot be read. A run with a single process saves first.
    """
    result: dict[str, Any] = {"step": start}
    pending: tuple[int, dict[str, jax.Array]] | None = None
    in_flight: deque[jax.Array] = deque()

    def stop_if_diverged(metrics: dict[str, float], step: int) -> None:
        if metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(_divergence_message(step, checkpoints.latest_step()))

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        (step, summary), pending = pending, None
        metrics = {name: float(value) for name, value in jax.device_get(summary).items()}
        del metrics["epoch_loss"]
        verdict = assess(metrics, step=step)
        seconds, waited = clock.lap()
        log.interval(step, metrics, seconds=seconds, data_seconds=waited, health=verdict.kind)
        if verdict.kind != result.get("health"):
            log.message(f"health: {verdict.text}")
        stop_if_diverged(metrics, step)
        result.update(metrics=metrics, health=verdict.kind)

    def finish_epoch(step: int, state: TrainState) -> None:
        epoch = step // cadence.steps_per_epoch - 1
        table = None
        if cadence.ends_with_knn(epoch):
            table = result["knn"] = score(state)
        if epoch == 0:
            # A run killed with a log but without a checkpoint would start over.
            checkpoints.wait()
        log.epoch(epoch, _epoch_metrics(epoch, _summary(state), schedules, cadence), table)

    def save(step: int, state: TrainState) -> None:
        report()
        jax.block_until_ready(state.step)  # so that the interval includes all steps so far
        with clock.excluded():
            stop_if_diverged(_summary(state), step)
            checkpoints.save(step, state)
        result["step"] = step

    # Scoring can take minutes, so it follows the checkpoint of an epoch. If a run is stopped
    # between the two, it scores the epoch when it resumes.
    if has_unlogged_epoch:
        finish_epoch(start, state)
    clock = IntervalClock(data_seconds)
    for step in range(start + 1, cadence.total_steps + 1):
        try:
            state = step_fn(state, next(batches))
        except (UsageError, OSError):  # unreadable data: the steps so far are valid
            if step > start + 1 and jax.process_count() == 1:  # a save needs all hosts
                save(step - 1, state)
            raise
        in_flight.append(state.step + 0)  # a copy, because the state is donated to the next step
        if len(in_flight) > STEPS_AHEAD:
            jax.block_until_ready(in_flight.popleft())
        report()
        if step % cadence.log_every == 0 or step == cadence.total_steps:
            rates = {name: schedule(step - 1) for name, schedule in schedules.items()}
            pending = step, health.summarize(state) | rates
        stopping = stop.should_stop(step, every=cadence.sync_every)
        ends_epoch = step % cadence.steps_per_epoch == 0
        saves = cadence.save_every and step % cadence.save_every == 0
        if not (stopping or ends_epoch or saves):
            continue
        save(step, state)
        if ends_epoch and (not stopping or step == cadence.total_steps):
            with clock.excluded():
                finish_epoch(step, state)
        if stopping:
            break
    return state, result


def _summary(state: TrainState) -> dict[str, float]:
    return {name: float(x) for name, x in jax.device_get(health.summarize(state)).items()}


def _divergence_message(step: int, saved: int | None) -> str:
    if saved is None:
        checkpoint = "there is no checkpoint yet"
    else:
        checkpoint = f"the checkpoint of step {saved} is intact: load it with --config.init_from"
    return (
        f"loss or gradients were not finite in {MAX_SKIPPED_IN_A_ROW} consecutive steps up to step "
        f"{step}; these steps changed no weights, and {checkpoint}. Try a lower optim.lr, a "
        "smaller optim.clip_grad (0.3), a longer optim.warmup_epochs, or model.dtype=float32, in a "
        "new workdir"
    )


def _epoch_metrics(
    epoch: int, summary: dict[str, float], schedules: dict[str, Schedule], cadence: Cadence
) -> dict[str, float]:
    """The means over an epoch, as in the reference's log."""
    steps = np.arange(epoch * cadence.steps_per_epoch, (epoch + 1) * cadence.steps_per_epoch)
    means = {name: float(np.mean(schedules[name](steps))) for name in ("lr", "weight_decay")}
    return {"loss": summary["epoch_loss"], **means, "skipped_steps": summary["skipped_steps"]}
