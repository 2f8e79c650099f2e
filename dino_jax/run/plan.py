"""Derives network, initial state, shardings and training step from a config."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.config import build
from dino_jax.config.spec import ModelSpec
from dino_jax.training import optim
from dino_jax.training.state import TrainState, initializer
from dino_jax.training.step import Batch, MakeViews, StepSettings
from dino_jax.training.views import make_views

PyTree = Any
LAST_FOLD = np.uint32(2**32 - 1)  # folded in for the initial weights; crops fold in the epoch


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that defines a run's computation. Contains no arrays."""

    init: Callable[[jax.Array], TrainState]  # maps a PRNG key to the initial state
    shapes: TrainState  # the abstract state
    shardings: TrainState
    step: StepSettings

    def first_state(self, seed: int) -> TrainState:
        """The state at step 0. Every array is created with its final sharding."""
        key = jax.random.fold_in(jax.random.key(seed), LAST_FOLD)
        return jax.jit(self.init, out_shardings=self.shardings)(key)

    def compute_center(self, state: TrainState, batch: Batch) -> jax.Array:
        """The mean [1, K] of the teacher's logits for a batch, the center of a run without one."""

        def mean_logits(state: TrainState, batch: Batch) -> jax.Array:
            views, _ = self.step.make_views(batch, jnp.zeros((), jnp.int32))
            logits, _ = self.step.network(
                state.teacher_params, state.teacher_batch_stats, views[:1]
            )
            return logits.mean((0, 1))[None]

        return jax.jit(mean_logits, out_shardings=self.shardings.center)(state, batch)


def make_plan(
    config: ConfigDict,
    spec: ModelSpec,
    mesh: Mesh,
    *,
    steps_per_epoch: int,
    views: MakeViews | None = None,
) -> Plan:
    """Plans a run: first the shapes, then shardings derived from them.

    Args:
      config: a checked config.
      spec: the config's model, from `build.compute_spec`.
      mesh: the devices.
      steps_per_epoch: optimizer steps in an epoch.
      views: makes the crops; by default `crop_maker(config)`.
    """
    tx = optim.make_optimizer(
        config.optim.name,
        clip_grad=config.optim.clip_grad,
        norm_last_layer=config.head.norm_last_layer,
    )
    network, init = initializer(spec.model, tx, num_prototypes=config.head.out_dim)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(shapes, mesh, config.train.sharding)
    step = StepSettings(
        network=network,
        tx=tx,
        make_views=views or crop_maker(config),
        **build.make_schedules(config, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        freeze_steps=config.optim.freeze_last_layer * steps_per_epoch,
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
        accumulation_steps=config.optim.accumulation_steps,
        log_every=config.log.every_steps,
        layout=sharding.pass_layout(shardings.params, mesh),
    )
    return Plan(init, shapes, shardings, step)


def crop_maker(config: ConfigDict) -> MakeViews:
    """The function that makes the crops of a batch, with the config's settings."""
    return partial(make_views, seed=config.seed, crops=build.crop_settings(config))
