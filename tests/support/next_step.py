"""One training step from a full checkpoint: its settings, its views, and this package's result."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dino_jax.models import DINOHead, create_model
from dino_jax.models.network import MultiCropModel, Network, abstract
from dino_jax.training import optim
from dino_jax.training.state import TrainState
from dino_jax.training.step import StepSettings, train_step
from dino_jax.weights.layouts.mapping import to_torch
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.state.training_state import whole_state
from tests.conftest import GOLDENS
from tests.support.reference import recipe_images

FULL = GOLDENS / "pth/full_checkpoint.pth"
META = json.loads(str(np.load(GOLDENS / "pth/expected.npz")["meta"]))
STEP = {
    "lr": 0.01,
    "weight_decay": 0.3,
    "clip_grad": 0.05,
    "momentum": 0.9,
    "student_temp": 0.1,
    "teacher_temp": 0.05,
    "center_momentum": 0.9,
}
BATCH, SIDES = 4, (32, 32, 16, 16)  # pixels of the views, global crops first


def views(step: int) -> list[np.ndarray]:
    """The views [BATCH, side, side, 3] of a step, in float32."""
    return [
        recipe_images(f"next step/{step}/{v}", (BATCH, 3, side, side))
        for v, side in enumerate(SIDES)
    ]


def in_any_precision(config: ConfigDict, rngs: nnx.Rngs) -> MultiCropModel:
    """A config's model, which computes in the precision of its arrays."""
    sizes = {key: value for key, value in config.model.overrides.items() if value is not None}
    backbone = create_model(
        config.model.name, patch_size=config.model.patch_size, rngs=rngs, **sizes
    )
    settings = {key: value for key, value in config.head.items() if key != "norm_last_layer"}
    return MultiCropModel(backbone, DINOHead(backbone.embed_dim, rngs=rngs, **settings))


@cache
def step_of(optimizer: str, norm_last_layer: bool) -> Callable[[TrainState, Any], TrainState]:
    """The compiled step for the fixture's network, with constant schedules."""
    config, _ = whole_state(read_torch_checkpoint(FULL))
    graphdef, *_ = abstract(partial(in_any_precision, config))
    settings = StepSettings(
        network=Network(graphdef),
        tx=optim.make_optimizer(
            optimizer, clip_grad=STEP["clip_grad"], norm_last_layer=norm_last_layer
        ),
        make_views=lambda batch, epoch: (batch, None),
        **{
            name: lambda step, value=STEP[name]: jnp.asarray(value, jnp.float64)
            for name in ("lr", "weight_decay", "momentum", "teacher_temp")
        },
        steps_per_epoch=1,
        freeze_steps=0,
        student_temp=STEP["student_temp"],
        center_momentum=STEP["center_momentum"],
    )
    return jax.jit(partial(train_step, settings=settings))


def our_step(path: Path, step: int) -> tuple[float, dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Takes a float64 step from a full checkpoint of the fixture's network.

    Returns: the loss; the new student and teacher, by the reference's names; and the center.
    """
    config, state = whole_state(read_torch_checkpoint(path))

    def doubled(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        images = [jnp.asarray(x, jnp.float64) for x in views(step)]
        groups = jnp.stack(images[:2], axis=1), jnp.stack(images[2:], axis=1)
        step_fn = step_of(config.optim.name, config.head.norm_last_layer)
        after = step_fn(jax.tree.map(doubled, state), groups)
    assert int(after.skipped_steps) == 0
    networks = {
        which: {
            f"{part}.{name}": array
            for part, family in (("backbone", "vit"), ("head", "head"))
            for name, array in to_torch(params[part], {}, family).items()
        }
        for which, params in (("student", after.params), ("teacher", after.teacher_params))
    }
    return float(after.meters.interval["loss"]), networks, np.asarray(after.center)


def fingerprint(update: np.ndarray) -> list[float]:
    """An array's sum, norm and first three values."""
    return [update.sum(), np.linalg.norm(update), *np.resize(update, 3)]
