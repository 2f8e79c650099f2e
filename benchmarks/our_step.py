"""Our training step, built from a config as `dino_jax.train.run` builds it, to be timed."""

import dataclasses
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from dino_jax.memory import planned_bytes
from dino_jax.run.plan import make_plan
from dino_jax.training.state import TrainState
from dino_jax.training.step import Batch, MakeViews, compile_step

STEPS_PER_EPOCH = 1000  # of the schedules; about those of a million images


@dataclasses.dataclass
class OurStep:
    """A compiled step and the state that it moves; calling it dispatches one step."""

    state: TrainState
    compiled: jax.stages.Compiled
    shardings: TrainState
    compile_seconds: float

    def __call__(self, batch: Batch) -> TrainState:
        self.state = self.compiled(self.state, batch)
        return self.state


def build(
    config: ConfigDict,
    batch: Batch,
    mesh: jax.sharding.Mesh,
    views: MakeViews,
) -> OurStep:
    """Makes the first state on the mesh and compiles the step for batches like this one."""
    plan = make_plan(config, mesh, steps_per_epoch=STEPS_PER_EPOCH, views=views)
    state = plan.first_state(config.seed)
    start = time.perf_counter()
    compiled = compile_step(plan.step, state, batch, plan.shardings)
    return OurStep(state, compiled, plan.shardings, time.perf_counter() - start)


def seconds_per_call(work: Callable[[], object], *, groups: int, size: int) -> list[float]:
    """Seconds a call in each of `groups` groups of `size` calls.

    Within a group the host runs ahead, as in training; the group ends when the device has finished.
    """
    seconds = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(size):
            result = work()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / size)
    return seconds


def peak_bytes(compiled: jax.stages.Compiled, device: jax.Device) -> tuple[int, str]:
    """The most memory that a step needs on a device, and who says so.

    The device's own count where it keeps one (it includes what else the process did so far), else
    what the compiler planned: arguments, outputs and temporaries.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return planned_bytes(compiled), "compiler"
