"""Infers a model's architecture and sizes from its tensors.

Dims: C image channels, P patch side.
"""

import logging
import math
import re
from typing import Any

import numpy as np

from dino_jax.config.spec import HeadSpec, ModelSpec
from dino_jax.errors import UsageError, listed
from dino_jax.models import MODELS, default_settings
from dino_jax.weights.layouts.foreign import project_of
from dino_jax.weights.layouts.torch_checkpoint import Tensors, TorchNetwork

HEAD_DIM = 64  # channels per attention head in most ViTs

# Heads by width of ViTs with a fixed position table, where they differ from the registered ones:
# MoCo-v3's ViT-S. MAE uses the same table with 768, 1024 and 1280 channels.
_HEADS_WITH_FIXED_POSITIONS = {384: 12}

_SIGNS = {  # a tensor that identifies the family; the first match wins
    "cls_attn_blocks.0.norm1.weight": "xcit",
    "cls_token": "vit",
    "layer1.0.conv1.weight": "resnet",
}
_Found = tuple[str, int | None, dict[str, Any], int]  # name, P, overrides, C


def family_of(backbone: Tensors) -> str:
    """The family of a backbone: "vit", "xcit" or "resnet".

    Raises:
      UsageError: the family is unknown.
    """
    for name, family in _SIGNS.items():
        if name in backbone:
            return family
    raise UsageError(
        f"the tensors ({listed(backbone, limit=10)}) are not from a ViT, XCiT or ResNet, which "
        f"have one of {', '.join(_SIGNS)}: give a backbone of these families"
    )


def infer(network: TorchNetwork, *, num_heads: int | None = None) -> ModelSpec:
    """The model that a network's tensors belong to, in float32.

    Args:
      network: its tensors.
      num_heads: attention heads of a ViT, which its tensors do not determine. By default, the
        heads of the registered ViT of the same width, or of MoCo-v3's. For other widths, width / 64
        heads are assumed (3 if this is not a whole number) and a warning is logged.
    Returns: the spec. For colour images, mean and std are ImageNet's, as in every published model;
      otherwise they are 0 and 1.
    Raises:
      UsageError: no registered architecture matches the tensors.
    """
    names = [*network.backbone, *(f"head.{name}" for name in network.head)]
    if project := project_of(names):
        raise UsageError(
            f"these are the tensors of {project.name}, which is not supported: {project.way_out}"
        )
    rule = {"vit": _vit, "xcit": _xcit, "resnet": _resnet}[family_of(network.backbone)]
    name, patch_size, overrides, channels = rule(network.backbone, num_heads)
    plain = {} if channels == 3 else {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    head = _head(network.head) if network.head else None
    return ModelSpec(name, patch_size, overrides, head, **plain)


def _shapes(tensors: Tensors, axes: dict[str, int]) -> list[tuple[int, ...]]:
    """The shapes of required tensors.

    Args:
      tensors: all tensors.
      axes: the required names, each with its number of axes.
    Raises:
      UsageError: tensors are missing or have another number of axes. The message lists ten of them.
    """
    problems = [f"{name} is missing" for name in axes if name not in tensors] + [
        f"{name} is {list(tensors[name].shape)}, expected {number} axes of at least 1"
        for name, number in axes.items()
        if name in tensors and (tensors[name].ndim != number or 0 in tensors[name].shape)
    ]
    if problems:
        raise UsageError(f"the network is unknown: {listed(problems, 10, '; ')}")
    return [tensors[name].shape for name in axes]


def _count(tensors: Tensors, pattern: str) -> int:
    """The number of distinct block numbers in the names."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _vit(tensors: Tensors, num_heads: int | None) -> _Found:
    (dim, channels, patch_size, width), (_, positions, _), (hidden, _) = _shapes(
        tensors, {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    )
    side = math.isqrt(positions - 1)
    if patch_size != width or side * side != positions - 1:
        raise UsageError(
            f"patches of {patch_size}x{width} pixels and {positions} positions: only square "
            "patches and square position tables with a class token are supported"
        )
    found = {
        "image_size": side * patch_size,
        "embed_dim": dim,
        "depth": _count(tensors, r"blocks\.(\d+)\."),
        "num_heads": num_heads or _vit_heads(dim, tensors["pos_embed"]),
        "mlp_ratio": hidden / dim,
    }
    differing = {
        name: {key: value for key, value in found.items() if sizes[key] != value}
        for name, sizes in _registered("vit").items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, patch_size, differing[name], channels


def _registered(family: str) -> dict[str, dict[str, Any]]:
    """The default settings of every registered architecture of a family."""
    return {n: default_settings(n) for n, build in MODELS.items() if build.func.family == family}


def _vit_heads(dim: int, positions: np.ndarray) -> int:
    if _are_fixed(positions) and dim in _HEADS_WITH_FIXED_POSITIONS:
        logging.warning(
            "the fixed position table identifies MoCo-v3's ViT of width %d, with %d attention "
            "heads. To change it, pass num_heads to `dino_jax.load`, or --num-heads to `convert`",
            dim,
            _HEADS_WITH_FIXED_POSITIONS[dim],
        )
        return _HEADS_WITH_FIXED_POSITIONS[dim]
    for sizes in _registered("vit").values():
        if sizes["embed_dim"] == dim:
            return sizes["num_heads"]
    heads = default_settings("vit_tiny")["num_heads"] if dim % HEAD_DIM else dim // HEAD_DIM
    logging.warning(
        "the tensors of a ViT of width %d do not determine its number of attention heads: assuming "
        "%d. To change it, pass num_heads to `dino_jax.load`, or --num-heads to `convert`",
        dim,
        heads,
    )
    return heads


def _are_fixed(positions: np.ndarray) -> bool:
    """Whether a position table [1, N, D] is the fixed one of MAE and MoCo-v3, of any size.

    The position of its class token is zero, which training would change.
    """
    return not positions[0, 0].any() and bool(positions[0, 1:].any())


def _xcit(tensors: Tensors, num_heads: int | None) -> _Found:
    del num_heads  # the registered architecture determines it
    (_, _, dim), (_, channels, _, _) = _shapes(
        tensors, {"cls_token": 3, "patch_embed.proj.0.0.weight": 4}
    )
    found = {
        "embed_dim": dim,
        "depth": _count(tensors, r"blocks\.(\d+)\."),
        "patch_size": 2 ** _count(tensors, r"patch_embed\.proj\.(\d+)\.0\.weight"),
    }
    return _name("xcit", found), None, {}, channels


def _resnet(tensors: Tensors, num_heads: int | None) -> _Found:
    del num_heads
    (_, channels, _, _), (inner, width_per_group, _, _) = _shapes(
        tensors, {"conv1.weight": 4, "layer1.0.conv2.weight": 4}
    )
    found = {
        "depths": tuple(_count(tensors, rf"layer{i}\.(\d+)\.") for i in range(1, 5)),
        "bottleneck": "layer1.0.conv3.weight" in tensors,
        "groups": inner // width_per_group,
        "width_per_group": width_per_group,
    }
    return _name("resnet", found), None, {}, channels


def _name(family: str, found: dict[str, Any]) -> str:
    """The name of the registered architecture that has these sizes."""
    for name, sizes in _registered(family).items():
        if all(sizes[key] == value for key, value in found.items()):
            return name
    text = ", ".join(f"{key}={value}" for key, value in found.items())
    raise UsageError(f"no registered {family} has {text}")


def _head(tensors: Tensors) -> HeadSpec:
    """Infers a head's sizes. A single MLP layer is named `mlp`, several `mlp.0`, `mlp.2`, ..."""
    weight_norm = "last_layer.weight_v" in tensors
    linear = [name for name, x in tensors.items() if name.startswith("mlp") and x.ndim == 2]
    first = linear[0] if linear else "mlp.0.weight"
    (out_dim, bottleneck_dim), (hidden_dim, _) = _shapes(
        tensors, {"last_layer.weight_v" if weight_norm else "last_layer.weight": 2, first: 2}
    )
    return HeadSpec(
        out_dim=out_dim,
        # A single layer has no hidden width.
        hidden_dim=hidden_dim if len(linear) > 1 else HeadSpec.hidden_dim,
        bottleneck_dim=bottleneck_dim,
        num_layers=len(linear),
        use_bn=any(name.endswith(".running_mean") for name in tensors),
        weight_norm=weight_norm,
    )
