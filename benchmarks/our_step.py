"""What a config describes (model, crops, schedules, training step), built as a run builds it.

The benchmarks use `dino_jax.config.build` here and nowhere else.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dino_jax.config import build
from dino_jax.config.spec import ModelSpec
from dino_jax.data.transforms.multicrop import CropSettings
from dino_jax.memory import planned_bytes
from dino_jax.models.network import MultiCropModel
from dino_jax.run.plan import Plan, make_plan
from dino_jax.training.state import TrainState
from dino_jax.training.step import Batch, MakeViews, compile_step

STEPS_PER_EPOCH = 1000  # for the schedules: about a million images


def spec_of(config: ConfigDict) -> ModelSpec:
    """The config's model, with dtype and attention kernel chosen for this machine as a run does."""
    return build.compute_spec(config, jax.default_backend(), jax.local_devices())[0]


def arithmetic(config: ConfigDict) -> dict[str, str | None]:
    """The compute dtype, and the kernel that computes the attention of a ViT."""
    spec = spec_of(config)
    return {"dtype": spec.dtype, "attention": spec.attention if spec.family == "vit" else None}


def abstract_model(config: ConfigDict) -> MultiCropModel:
    """Backbone and head, with shapes in place of arrays."""
    return nnx.eval_shape(lambda: build.model_spec(config).model(nnx.Rngs(0)))


def crop_settings(config: ConfigDict) -> CropSettings:
    return build.crop_settings(config)


def schedule_values(
    config: ConfigDict, *, steps_per_epoch: int, steps: int
) -> dict[str, np.ndarray]:
    """The values [steps] of lr, weight_decay, momentum and teacher_temp."""
    return {
        name: np.asarray(jax.vmap(schedule)(np.arange(steps)))
        for name, schedule in build.make_schedules(config, steps_per_epoch).items()
    }


def lay_out(config: ConfigDict, mesh: jax.sharding.Mesh, views: MakeViews | None = None) -> Plan:
    """The shapes, shardings and step settings of a run; `views` as in `make_plan`."""
    return make_plan(config, spec_of(config), mesh, steps_per_epoch=STEPS_PER_EPOCH, views=views)


@dataclasses.dataclass
class OurStep:
    """A compiled step and the state that it updates. A call dispatches one step."""

    state: TrainState
    compiled: jax.stages.Compiled
    plan: Plan
    compile_seconds: float

    def __call__(self, batch: Batch) -> TrainState:
        self.state = self.compiled(self.state, batch)
        return self.state


def compiled_step(
    config: ConfigDict, batch: Batch, mesh: jax.sharding.Mesh, views: MakeViews | None = None
) -> OurStep:
    """Initialises the state on the mesh and compiles the step for batches like this one."""
    plan = lay_out(config, mesh, views)
    state = plan.first_state(config.seed)
    start = time.perf_counter()
    compiled = compile_step(plan.step, state, batch, plan.shardings)
    return OurStep(state, compiled, plan, time.perf_counter() - start)


def seconds_per_call(work: Callable[[], Any], *, groups: int, size: int) -> list[float]:
    """Seconds per call in each of `groups` groups of `size` calls.

    Within a group the host runs ahead, as in training. A group ends when the device has finished.
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
    """The peak memory of a step on a device, and where the number comes from.

    "device": its own statistics, which include everything the process did so far. "compiler", for
    devices without statistics: the planned arguments, outputs and temporaries.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return planned_bytes(compiled), "compiler"
