"""Validates a config before anything runs, and warns about unusual settings."""

import math

from flax import nnx
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.config.build import compute_dtype, crop_settings, flatten, model_spec
from dino_jax.data.decode import MAX_PIXELS
from dino_jax.errors import UsageError
from dino_jax.models.network import abstract
from dino_jax.training import optim

MAX_THREADS = 1024  # far above any useful number: threads decode images
MAX_SIDE = 10_000  # pixels


def check(config: ConfigDict, num_devices: int) -> None:
    """Rejects invalid settings without creating any array.

    Raises:
      UsageError: a setting is invalid. The message names key, value, rule and remedy.
    """
    batch, accumulation = config.train.batch_size, config.optim.accumulation_steps
    if accumulation < 1:
        raise UsageError(f"optim.accumulation_steps={accumulation} must be at least 1, the default")
    if batch < 1 or batch % (num_devices * accumulation):
        raise UsageError(
            f"train.batch_size={batch} is not divisible by {num_devices} devices times "
            f"optim.accumulation_steps={accumulation}: choose a multiple of "
            f"{num_devices * accumulation}"
        )
    if config.data.train is None:
        raise UsageError(
            "data.train is not set: add --config.data.train=folder:/path/to/images "
            "(or tfds:NAME@SPLIT, idx:/path@SPLIT, shapes:N@SPLIT)"
        )
    _check_numbers(config)
    compute_dtype(config.model.dtype, "cpu")  # raises if the name is unknown
    if len(config.crops.mean) not in (1, 3):
        raise UsageError(
            f"crops.mean={config.crops.mean} has {len(config.crops.mean)} values: use 1 for "
            "greyscale images or 3 for colour"
        )
    _check_patches(config)
    if config.optim.name not in optim.OPTIMIZERS:
        raise UsageError(
            f"optim.name={config.optim.name!r} is unknown: choose one of "
            f"{', '.join(optim.OPTIMIZERS)}"
        )
    if config.train.sharding not in sharding.MODES:
        raise UsageError(
            f"train.sharding={config.train.sharding!r} is unknown: choose one of "
            f"{', '.join(sharding.MODES)}"
        )
    if config.eval.knn_every_epochs:
        _check_knn(config)
    crop_settings(config)


def _check_knn(config: ConfigDict) -> None:
    if config.eval.knn_test is None:
        raise UsageError(
            f"eval.knn_every_epochs={config.eval.knn_every_epochs} enables k-NN scores, but "
            "eval.knn_test is not set: set it to a labelled source, or set eval.knn_every_epochs=0"
        )
    if config.eval.crop > min(config.eval.resize, config.eval.canvas_size):
        raise UsageError(
            f"eval.crop={config.eval.crop} must be at most eval.resize={config.eval.resize} and "
            f"eval.canvas_size={config.eval.canvas_size}"
        )


def _check_patches(config: ConfigDict) -> None:
    """Builds the abstract model and checks that image sizes are multiples of a ViT's patch size."""
    backbone = nnx.eval_shape(lambda: model_spec(config).model(nnx.Rngs(0))).backbone
    if backbone.family != "vit":
        return  # convolutional networks accept any size
    flat = flatten(config)
    used = {
        "crops.local_size": config.crops.local_number,
        "eval.crop": config.eval.knn_every_epochs,
    }
    for key in ("crops.global_size", "crops.local_size", "eval.crop"):
        if used.get(key, True) and flat[key] % backbone.patch_size:
            raise UsageError(
                f"{key}={flat[key]} is not a multiple of model.patch_size={backbone.patch_size}: "
                "part of every image would be cut off; change one of them"
            )


_POSITIVE = (
    "model.patch_size",
    "train.epochs",
    "loss.student_temp",
    "loss.teacher_temp",
    "loss.warmup_teacher_temp",
    "log.every_steps",
    "crops.global_size",
    "crops.local_size",
    "data.canvas_size",
    "data.num_threads",
    "data.max_pixels",
    "eval.resize",
    "eval.crop",
    "eval.canvas_size",
    "eval.batch_size",
    "eval.knn_temperature",
)
_NOT_NEGATIVE = (
    "seed",
    "optim.lr",
    "optim.min_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.clip_grad",
    "optim.freeze_last_layer",
    "loss.warmup_teacher_temp_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep_every_epochs",
    "eval.knn_every_epochs",
    "log.attention_sheet",
)
_SIDES = (
    "crops.global_size",
    "crops.local_size",
    "data.canvas_size",
    "eval.resize",
    "eval.crop",
    "eval.canvas_size",
)
_FRACTIONS = ("loss.center_momentum", "optim.momentum_teacher", "data.max_unreadable")


def _check_numbers(config: ConfigDict) -> None:
    flat = flatten(config)
    rules = [
        (_POSITIVE, "be finite and above 0", lambda x: x > 0),
        (_NOT_NEGATIVE, "be finite and not negative", lambda x: x >= 0),
        (_SIDES, f"be at most {MAX_SIDE} pixels", lambda x: x <= MAX_SIDE),
        (("seed",), "be below 2**32", lambda x: x < 2**32),  # JAX uses 32 bits of it
        (
            ("data.max_pixels",),
            f"be at most {MAX_PIXELS}, Pillow's limit",
            lambda x: x <= MAX_PIXELS,
        ),
        (_FRACTIONS, "be between 0 and 1", lambda x: 0 <= x <= 1),
    ]
    for keys, rule, holds in rules:
        for key in keys:
            if flat[key] is not None and not (math.isfinite(flat[key]) and holds(flat[key])):
                raise UsageError(f"{key}={flat[key]} must {rule}")
    if config.data.num_threads > MAX_THREADS:
        raise UsageError(
            f"data.num_threads={config.data.num_threads} is more than {MAX_THREADS}: the threads "
            "decode images, so use about one per CPU core"
        )
    if not config.eval.knn_ks or any(type(k) is not int or k < 1 for k in config.eval.knn_ks):
        raise UsageError(f"eval.knn_ks={config.eval.knn_ks} must be whole numbers of at least 1")


def advice(config: ConfigDict) -> list[str]:
    """Warnings for valid but probably unintended settings, one sentence each."""
    epochs, found = config.train.epochs, []
    if config.optim.warmup_epochs > epochs:
        found.append(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is longer than the run of "
            f"{epochs} epochs: the learning rate never reaches optim.lr"
        )
    if config.loss.warmup_teacher_temp_epochs > epochs:
        found.append(
            f"loss.warmup_teacher_temp_epochs={config.loss.warmup_teacher_temp_epochs} is longer "
            f"than the run of {epochs} epochs: the teacher never reaches loss.teacher_temp"
        )
    if config.optim.freeze_last_layer >= epochs:
        found.append(
            f"optim.freeze_last_layer={config.optim.freeze_last_layer} covers the whole run of "
            f"{epochs} epochs: the prototypes are never trained"
        )
    accumulation = config.optim.accumulation_steps
    if accumulation > 1 and abstract(model_spec(config).model)[2]:
        found.append(
            f"optim.accumulation_steps={accumulation} changes the result of a network with "
            "BatchNorm, which normalizes each micro-batch on its own"
        )
    if config.loss.teacher_temp > 0.07:
        found.append(
            f"loss.teacher_temp={config.loss.teacher_temp} is above 0.07, about the highest value "
            "that trains stably: watch the health line"
        )
    if config.crops.local_number == 0 and config.crops.global_scale[0] > 0.14:
        found.append(
            "without local crops (crops.local_number=0) the paper recommends "
            "crops.global_scale=(0.14, 1.0)"
        )
    return found
