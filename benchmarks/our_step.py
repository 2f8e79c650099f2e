"""Our training step, built from a config as `dino_jax.train.run` builds it, to be timed."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
from ml_collections import ConfigDict

from dino_jax import optim, settings, sharding
from dino_jax.step import MakeViews, StepSettings
from dino_jax.train import Batch, compile_step, make_views
from dino_jax.train_state import TrainState, initializer

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


def crop_maker(config: ConfigDict) -> MakeViews:
    """Makes the crops of a config, as `train.run` does."""
    return partial(make_views, seed=config.seed, crops=settings.crop_settings(config))


def build(
    config: ConfigDict,
    batch: Batch,
    mesh: jax.sharding.Mesh,
    views: MakeViews,
) -> OurStep:
    """Makes the first state on the mesh and compiles the step for batches like this one."""
    tx = optim.make_optimizer(
        config.optim.name,
        clip_grad=config.optim.clip_grad,
        norm_last_layer=config.head.norm_last_layer,
    )
    network, init = initializer(
        partial(settings.build_model, config), tx, num_prototypes=config.head.out_dim
    )
    key = jax.random.key(config.seed)
    shardings = sharding.state_shardings(jax.eval_shape(init, key), mesh, config.train.sharding)
    state = jax.jit(init, out_shardings=shardings)(key)
    step_settings = StepSettings(
        network=network,
        tx=tx,
        make_views=views,
        **settings.make_schedules(config, STEPS_PER_EPOCH),
        steps_per_epoch=STEPS_PER_EPOCH,
        freeze_steps=config.optim.freeze_last_layer * STEPS_PER_EPOCH,
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
        accumulation_steps=config.optim.accumulation_steps,
        log_every=config.log.every_steps,
        weights_sharding=sharding.replicated(mesh),
        gradients_sharding=shardings.params,
    )
    start = time.perf_counter()
    compiled = compile_step(step_settings, state, batch, shardings)
    return OurStep(state, compiled, shardings, time.perf_counter() - start)


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
    plan = compiled.memory_analysis()
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes  # donated inputs are reused
    return plan.argument_size_in_bytes + outputs + plan.temp_size_in_bytes, "compiler"
