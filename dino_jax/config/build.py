"""From a config to the plain values that the package works with.

What lies below takes plain values and knows nothing of configs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from dino_jax.data.transforms.multicrop import CropSettings
from dino_jax.errors import UsageError
from dino_jax.models import DINOHead, create_model, default_settings, vit
from dino_jax.models.attention_kernel import KernelChoice, choose_kernel
from dino_jax.models.block import check_transformer
from dino_jax.models.network import MultiCropModel
from dino_jax.training import schedules

TRANSFORMER_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a config's `model.dtype`; "auto" is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UsageError(f"model.dtype={name!r} is unknown: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def attention_kernel(config: ConfigDict) -> KernelChoice:
    """The kernel for the attention of a config's ViT, checked at every size of its images."""
    sizes = default_settings(config.model.name) | _chosen(config.model.overrides)
    check_transformer(**{key: sizes[key] for key in TRANSFORMER_SIZES})
    patch_size = config.model.patch_size or sizes["patch_size"]
    sides = (config.crops.get("global_size"), config.crops.get("local_size"), config.eval.crop)
    return choose_kernel(
        config.model.get("attention", "auto"),
        compute_dtype(config.model.dtype),
        num_heads=sizes["num_heads"],
        head_dim=sizes["embed_dim"] // sizes["num_heads"],
        lengths=tuple(sorted({1 + (side // patch_size) ** 2 for side in sides if side})),
    )


def build_backbone(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    """The backbone of a config, with random weights."""
    overrides = _chosen(config.model.overrides)
    if config.model.name in vit.ARCHITECTURES:
        overrides["attention"] = attention_kernel(config).kernel
    if config.model.drop_path_rate:  # not every architecture has stochastic depth
        overrides["drop_path_rate"] = config.model.drop_path_rate
    return create_model(
        config.model.name,
        patch_size=config.model.patch_size,
        dtype=compute_dtype(config.model.dtype),
        remat=config.model.remat,
        in_channels=len(config.crops.mean),
        rngs=rngs,
        **overrides,
    )


def _chosen(settings: ConfigDict) -> dict[str, Any]:
    """Those that are set."""
    return {key: value for key, value in settings.items() if value is not None}


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> MultiCropModel:
    """Backbone and head of a config, with random weights, in training mode."""
    backbone = build_backbone(config, rngs)
    head = DINOHead(
        backbone.embed_dim,
        config.head.out_dim,
        hidden_dim=config.head.hidden_dim,
        bottleneck_dim=config.head.bottleneck_dim,
        num_layers=config.head.num_layers,
        use_bn=config.head.use_bn,
        weight_norm=config.head.weight_norm,
        dtype=compute_dtype(config.model.dtype),
        rngs=rngs,
    )
    model = MultiCropModel(backbone, head)
    model.train()
    return model


def crop_settings(config: ConfigDict) -> CropSettings:
    """The crops of a config."""
    return CropSettings(**config.crops)


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> dict[str, schedules.Schedule]:
    """A config's schedules: lr, weight_decay, momentum (of the teacher) and teacher_temp."""
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


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
