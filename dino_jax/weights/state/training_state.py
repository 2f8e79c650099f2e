"""Converts a full checkpoint of the reference to a training state and settings."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.config.build import spec_settings
from dino_jax.errors import UsageError, about
from dino_jax.training import optim
from dino_jax.training.state import TrainState, start_state
from dino_jax.weights.layouts.torch_checkpoint import TorchCheckpoint
from dino_jax.weights.load import arrays_of, from_torch
from dino_jax.weights.state.optimizer_state import norms_are_fixed, optimizer_state

_KEYS = {  # argument of the reference: our key
    "warmup_teacher_temp": "loss.warmup_teacher_temp",
    "teacher_temp": "loss.teacher_temp",
    "warmup_teacher_temp_epochs": "loss.warmup_teacher_temp_epochs",
    "optimizer": "optim.name",
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "warmup_epochs": "optim.warmup_epochs",
    "weight_decay": "optim.weight_decay",
    "weight_decay_end": "optim.weight_decay_end",
    "clip_grad": "optim.clip_grad",
    "freeze_last_layer": "optim.freeze_last_layer",
    "momentum_teacher": "optim.momentum_teacher",
    "drop_path_rate": "model.drop_path_rate",
    "global_crops_scale": "crops.global_scale",
    "local_crops_number": "crops.local_number",
    "local_crops_scale": "crops.local_scale",
    "epochs": "train.epochs",
    "seed": "seed",
}


def whole_state(
    found: TorchCheckpoint, *, num_heads: int | None = None
) -> tuple[ConfigDict, TrainState]:
    """The training state of a full checkpoint, at step 0, and the known part of its config.

    Args:
      found: a checkpoint of kind "full".
      num_heads: see `architecture.infer`.
    Raises:
      UsageError: a part is missing or has the wrong shape.
    """
    parts = {name: found.networks.get(name) for name in ("student", "teacher")}
    parts |= {"dino_loss": found.center, "epoch": found.epoch, "optimizer": found.optimizer}
    if lacking := [part for part, value in parts.items() if value is None]:
        raise UsageError(
            f"the training state lacks {', '.join(lacking)}: convert the file with "
            "--backbone-only, or start a run from it with --config.init_from"
        )
    student = found.network("student")
    spec, student_arrays = from_torch(student, num_heads=num_heads)
    if spec.head is None:
        raise UsageError("its student has no head: convert the file with --backbone-only")
    with about("teacher"):
        teacher_arrays = arrays_of(found.network("teacher"), spec)
    config = spec_settings(spec)
    for key, value in ({"optim.name": "adamw"} | known_settings(found.args)).items():
        section, _, setting = key.rpartition(".")
        config.update({section: {setting: value}} if section else {setting: value})
    fixed = norms_are_fixed(found.optimizer, student)
    # None if there are no norms.
    config.head.norm_last_layer = fixed if config.head.weight_norm else None
    tx = optim.make_optimizer(config.optim.name, clip_grad=0, norm_last_layer=fixed)
    start = partial(start_state, tx=tx, num_prototypes=config.head.out_dim)
    shapes = jax.eval_shape(start, student_arrays["params"], student_arrays["batch_stats"])
    if found.center.shape != shapes.center.shape:
        raise UsageError(
            f"the center has shape {list(found.center.shape)}, but the head has "
            f"{config.head.out_dim} prototypes"
        )
    student_arrays, teacher_arrays = jax.tree.map(jnp.array, (student_arrays, teacher_arrays))
    state = shapes.replace(
        **student_arrays,
        **{f"teacher_{part}": tree for part, tree in teacher_arrays.items()},
        center=jnp.array(found.center, jnp.float32),
        opt_state=optimizer_state(found.optimizer, student, shapes.opt_state, config.optim.name),
    )
    # The remaining abstract arrays, step and meters, start at zero.
    return config, jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype), state
    )


def known_settings(args: dict[str, Any]) -> dict[str, Any]:
    """Converts the reference's arguments to our keys and values; unknown ones are skipped."""
    plain = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in args.items()
        if is_plain(value)
    }
    known = {ours: plain[theirs] for theirs, ours in _KEYS.items() if theirs in plain}
    batch = [plain.get(name) for name in ("batch_size_per_gpu", "world_size")]
    if all(isinstance(number, int) for number in batch):
        known["train.batch_size"] = math.prod(batch)
    return known


def is_plain(value: Any) -> bool:
    """Whether a setting can have this value: text, a number, or several numbers."""
    if isinstance(value, tuple | list):
        return all(isinstance(x, int | float) for x in value)
    return isinstance(value, bool | int | float | str)
