"""The training loop: steps, and what is written between them."""

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

STEPS_AHEAD = 2
CONFER_STEPS = 10  # after which several hosts ask each other at the latest whether to stop


class TrainingDiverged(RuntimeError):
    """Loss or gradients were not finite several steps in a row; the last checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When what happens, in steps."""

    steps_per_epoch: int
    total_steps: int
    log_every: int
    save_every: int  # 0: at the end of epochs only
    knn_every_epochs: int  # 0: never

    @property
    def confer_every(self) -> tuple[int, int]:
        """At multiples of these steps several hosts agree on whether to stop."""
        return min(self.log_every, CONFER_STEPS), self.steps_per_epoch

    def scores(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, ends with k-NN scores; the last one does."""
        every = self.knn_every_epochs
        last = epoch + 1 == self.total_steps // self.steps_per_epoch
        return bool(every) and (last or (epoch + 1) % every == 0)


class IntervalClock:
    """Wall time and time waited for data since the last lap, without what is excluded."""

    def __init__(self, data_seconds: Callable[[], float]) -> None:
        self._data_seconds = data_seconds  # waited since whenever
        self._start, self._waited = time.perf_counter(), data_seconds()

    def lap(self) -> tuple[float, float]:
        """(seconds, seconds waited for data) since the last lap; begins the next."""
        start, waited = self._start, self._waited
        self._start, self._waited = time.perf_counter(), self._data_seconds()
        return self._start - start, self._waited - waited

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leaves what happens inside out of the interval."""
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
    owes_epoch: bool,
    cadence: Cadence,
    schedules: dict[str, Schedule],
    assess: Callable[..., health.Verdict],
    score: Callable[[TrainState], Table],
    log: RunLog,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the steps from `start` to the end, or until a stop is requested.

    The host stays ahead of the device, which never waits for it: an interval's metrics are fetched
    after the next step is under way. It does not run further ahead than `STEPS_AHEAD` steps, since
    every step under way holds a batch in the device's memory.

    Args:
      state: the state after `start` steps; donated.
      step_fn: the compiled step.
      batches: from step `start` on.
      data_seconds: seconds that `next(batches)` has waited in all.
      start: steps finished.
      owes_epoch: an epoch ends there, and the log lacks its line.
      cadence: when to log, save and evaluate.
      schedules: by the names that the log gives their values.
      assess: (metrics, step=) to a verdict on the run's health.
      score: the teacher's k-NN table.
      log: of the run.
      checkpoints: of the run.
      stop: asks the loop to save and end after the step under way.
    Returns: the state, and {step, metrics, health, knn} of its end, as far as there are any.
    Raises:
      TrainingDiverged: too many steps in a row were not finite; nothing was saved since.
      UsageError, OSError: of the data; a run of one process has saved the steps before.
    """
    result: dict[str, Any] = {"step": start}
    pending: tuple[int, dict[str, jax.Array]] | None = None
    under_way: deque[jax.Array] = deque()

    def stop_if_diverged(metrics: dict[str, float], step: int) -> None:
        if metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(_advice_on_divergence(step, checkpoints.latest_step()))

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
        if cadence.scores(epoch):
            table = result["knn"] = score(state)
        if epoch == 0:
            checkpoints.wait()  # killed with a log but no checkpoint, a run would begin anew
        log.epoch(epoch, _epoch_metrics(epoch, _summary(state), schedules, cadence), table)

    def save(step: int, state: TrainState) -> None:
        report()
        jax.block_until_ready(state.step)  # what was computed so far belongs to the interval
        with clock.excluded():
            stop_if_diverged(_summary(state), step)
            checkpoints.save(step, state)
        result["step"] = step

    # An epoch's scores can take minutes: they come after its checkpoint, and a run that was stopped
    # between the two writes them when it continues.
    if owes_epoch:
        finish_epoch(start, state)
    clock = IntervalClock(data_seconds)
    for step in range(start + 1, cadence.total_steps + 1):
        try:
            state = step_fn(state, next(batches))
        except (UsageError, OSError):  # of the data: the steps so far are good
            if step > start + 1 and jax.process_count() == 1:  # other hosts would not join in
                save(step - 1, state)
            raise
        under_way.append(state.step + 0)  # a copy, since the next step takes the state's arrays
        if len(under_way) > STEPS_AHEAD:
            jax.block_until_ready(under_way.popleft())
        report()
        if step % cadence.log_every == 0 or step == cadence.total_steps:
            rates = {name: schedule(step - 1) for name, schedule in schedules.items()}
            pending = step, health.summarize(state) | rates
        stopping = stop.agreed(step, every=cadence.confer_every)
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


def _advice_on_divergence(step: int, saved: int | None) -> str:
    if saved is None:
        left = "there is no checkpoint yet"
    else:
        left = f"the checkpoint of step {saved} is good: --config.init_from takes its weights"
    return (
        f"loss or gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last by "
        f"step {step}, and changed nothing; {left}. Try a lower optim.lr, a smaller "
        "optim.clip_grad (0.3), a longer optim.warmup_epochs, or model.dtype=float32, in a new "
        "workdir"
    )


def _epoch_metrics(
    epoch: int, summary: dict[str, float], schedules: dict[str, Schedule], cadence: Cadence
) -> dict[str, float]:
    """Means over an epoch, as the reference logs them."""
    steps = np.arange(epoch * cadence.steps_per_epoch, (epoch + 1) * cadence.steps_per_epoch)
    means = {name: float(np.mean(schedules[name](steps))) for name in ("lr", "weight_decay")}
    return {"loss": summary["epoch_loss"], **means, "skipped_steps": summary["skipped_steps"]}
