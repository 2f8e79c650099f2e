"""Converts a config to the plain values that the rest of the package takes.

Models, training, data and evaluations take plain values and know nothing of configs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from dino_jax.config.spec import DTYPES, HeadSpec, ModelSpec
from dino_jax.data.transforms.multicrop import CropSettings
from dino_jax.errors import UsageError
from dino_jax.models.attention_kernel import choose_kernel
from dino_jax.training import schedules


def model_spec(config: ConfigDict) -> ModelSpec:
    """The model that a config describes, in float32 with XLA's attention kernel.

    `compute_spec` also chooses the dtype and the kernel for the current machine.

    Args:
      config: a run's config, or the partial config that `spec_settings` writes for a converted
        checkpoint.
    """
    model, head = config.model, config.head
    return ModelSpec(
        arch=model.name,
        patch_size=model.patch_size,
        overrides={key: value for key, value in model.overrides.items() if value is not None},
        head=head and HeadSpec(**{name: head[name] for name in HeadSpec.__dataclass_fields__}),
        drop_path_rate=model.drop_path_rate or 0.0,
        remat=model.remat,
        resize=config.eval.resize,
        crop=config.eval.crop,
        # Absent from the earliest converted checkpoints.
        canvas_size=config.eval.get("canvas_size", ModelSpec.canvas_size),
        mean=tuple(config.crops.mean),
        std=tuple(config.crops.std),
    )


def spec_settings(spec: ModelSpec) -> ConfigDict:
    """The part of a config that describes a model: the inverse of `model_spec`."""
    unset = dict.fromkeys(("image_size", "embed_dim", "depth", "num_heads", "mlp_ratio"))
    return ConfigDict(
        {
            "model": {
                "name": spec.arch,
                "patch_size": spec.patch_size,
                "drop_path_rate": None,
                "dtype": spec.dtype,
                "attention": "auto",
                "remat": spec.remat,
                "overrides": unset | dict(spec.overrides),
            },
            "head": spec.head and dataclasses.asdict(spec.head),
            "crops": {"mean": spec.mean, "std": spec.std},
            "eval": {
                "resize": spec.resize,
                "crop": spec.crop,
                "canvas_size": spec.canvas_size,
            },
        }
    )


def compute_spec(
    config: ConfigDict, platform: str, devices: Sequence[jax.Device]
) -> tuple[ModelSpec, str | None]:
    """The model that a config describes, with dtype and attention kernel chosen for a platform.

    A run calls this once, at its start, and passes the result down.

    Args:
      config: a checked config; `model.dtype` and `model.attention` may be "auto".
      platform: the platform that the model runs on: "cpu", "gpu" or "tpu".
      devices: the devices of this process, on which cuDNN's attention kernel is tested. If empty,
        the test is skipped.
    Returns: (spec, note). The note is a sentence for the log if the requested kernel was replaced,
      else None.
    Raises:
      UsageError: the dtype or the kernel is unknown.
    """
    spec = dataclasses.replace(
        model_spec(config), dtype=compute_dtype(config.model.dtype, platform)
    )
    if spec.family != "vit":
        return spec, None
    sizes = spec.sizes
    sides = (config.crops.global_size, config.crops.local_size, spec.crop)
    kernel, note = choose_kernel(
        config.model.attention,
        DTYPES[spec.dtype],
        num_heads=sizes["num_heads"],
        head_dim=sizes["embed_dim"] // sizes["num_heads"],
        lengths=tuple(sorted({1 + (side // sizes["patch_size"]) ** 2 for side in sides})),
        platform=platform,
        devices=devices,
    )
    return dataclasses.replace(spec, attention=kernel), note


def compute_dtype(name: str, platform: str) -> str:
    """Resolves `model.dtype`: "auto" is float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UsageError(f"model.dtype={name!r} is unknown: choose auto, {', '.join(DTYPES)}")
    return name


def crop_settings(config: ConfigDict) -> CropSettings:
    """The crop settings in a config."""
    return CropSettings(**config.crops)


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> dict[str, schedules.Schedule]:
    """A config's schedules: lr, weight_decay, momentum (the teacher's) and teacher_temp."""
    total_steps = config.train.epochs * steps_per_epoch
    return {
        "lr": schedules.cosine(
            config.optim.lr * config.train.batch_size / 256,
            config.optim.min_lr,
            total_steps=total_steps,
            warmup_steps=config.optim.warmup_epochs * steps_per_epoch,
        ),
        "weight_decay": schedules.cosine(
            config.optim.weight_decay, config.optim.weight_decay_end, total_steps=total_steps
        ),
        "momentum": schedules.cosine(config.optim.momentum_teacher, 1.0, total_steps=total_steps),
        "teacher_temp": schedules.teacher_temperature(
            config.loss.warmup_teacher_temp,
            config.loss.teacher_temp,
            warmup_epochs=config.loss.warmup_teacher_temp_epochs,
            steps_per_epoch=steps_per_epoch,
        ),
    }


def flatten(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """A config as {"section.key": value}. Tuples become lists, as in JSON."""
    nested = config.to_dict() if isinstance(config, ConfigDict) else config
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in traverse_util.flatten_dict(nested, sep=".").items()
    }
