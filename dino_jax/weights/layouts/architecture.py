"""From a network's tensors to the settings that build it; nothing is asked that they can tell.

Dims: D width, C channels of the images, P side of a patch, S side of the position table.
"""

import logging
import math
import re
from typing import Any

from dino_jax.errors import UsageError
from dino_jax.models import MODELS, default_settings
from dino_jax.weights.layouts.torch_checkpoint import Tensors, TorchNetwork

OVERRIDES = ("image_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Pixels: the first two are those of the paper's evaluations.
EVAL_SIZES = {"resize": 256, "crop": 224, "canvas_size": 512}
HEAD_DIM = 64  # channels of an attention head in every ViT that was published

_SIGNS = {  # a tensor that only this family has; the first that is there decides
    "cls_attn_blocks.0.norm1.weight": "xcit",
    "cls_token": "vit",
    "layer1.0.conv1.weight": "resnet",
}
_Found = tuple[str, int | None, dict[str, Any], int]  # name, P, overrides, C


def family_of(backbone: Tensors) -> str:
    """The family of a backbone: "vit", "xcit" or "resnet".

    Raises:
      UsageError: of none.
    """
    for name, family in _SIGNS.items():
        if name in backbone:
            return family
    raise UsageError(
        f"no ViT, XCiT or ResNet has these tensors ({', '.join(list(backbone)[:5])}, ...): "
        f"they have one of {', '.join(_SIGNS)}"
    )


def infer(network: TorchNetwork, *, num_heads: int | None = None) -> dict[str, Any]:
    """The sections `model`, `head`, `crops` and `eval` of the config of a network.

    Args:
      network: its tensors.
      num_heads: attention heads of a ViT, which its tensors do not tell. Unset, the published
        ViTs' rule holds (64 channels a head); a width that it does not fit gets 3, which is logged.
    Returns: `head` is None where there is none. What tensors cannot tell is None or missing; for
      colour images mean and std are ImageNet's, which every published model was trained with.
    Raises:
      UsageError: the tensors are of no architecture in the registry.
    """
    rule = {"vit": _vit, "xcit": _xcit, "resnet": _resnet}[family_of(network.backbone)]
    name, patch_size, overrides, channels = rule(network.backbone, num_heads)
    plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {
        "model": {
            "name": name,
            "patch_size": patch_size,
            "drop_path_rate": None,
            "dtype": "float32",
            "attention": "auto",
            "remat": "none",
            "overrides": dict.fromkeys(OVERRIDES) | overrides,
        },
        "head": _head(network.head) if network.head else None,
        "crops": IMAGENET if channels == 3 else plain,
        "eval": EVAL_SIZES,
    }


def _shapes(tensors: Tensors, axes: dict[str, int]) -> list[tuple[int, ...]]:
    """Shapes of tensors that must be there, each with so many axes.

    Raises:
      UsageError: names all that are not.
    """
    problems = [f"{name} is missing" for name in axes if name not in tensors] + [
        f"{name} is {list(tensors[name].shape)}, not {number} axes of at least 1"
        for name, number in axes.items()
        if name in tensors and (tensors[name].ndim != number or 0 in tensors[name].shape)
    ]
    if problems:
        raise UsageError(f"it is of no network that is known here: {'; '.join(problems)}")
    return [tensors[name].shape for name in axes]


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers there are in the names."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _vit(tensors: Tensors, num_heads: int | None) -> _Found:
    (dim, channels, patch_size, width), (_, positions, _), (hidden, _) = _shapes(
        tensors, {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    )
    side = math.isqrt(positions - 1)
    if patch_size != width or side * side != positions - 1:
        raise UsageError(
            f"patches of {patch_size}x{width} pixels and {positions} positions: only square "
            "patches, and square position tables with a class token, are known here"
        )
    found = {
        "image_size": side * patch_size,
        "embed_dim": dim,
        "depth": _count(tensors, r"blocks\.(\d+)\."),
        "num_heads": num_heads or _vit_heads(dim),
        "mlp_ratio": hidden / dim,
    }
    differing = {
        name: {key: value for key, value in found.items() if sizes[key] != value}
        for name, sizes in _registered("vit").items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, patch_size, differing[name], channels


def _registered(family: str) -> dict[str, dict[str, Any]]:
    """The sizes that the names of a family stand for."""
    return {n: default_settings(n) for n, build in MODELS.items() if build.func.family == family}


def _vit_heads(dim: int) -> int:
    if dim % HEAD_DIM == 0:
        return dim // HEAD_DIM
    heads = default_settings("vit_tiny")["num_heads"]
    logging.warning(
        "a ViT %d wide: its tensors do not tell the number of attention heads; %d are assumed, as "
        "vit_tiny has. If it is another number, `dino_jax.load(..., num_heads=)` and "
        "`convert --num-heads` take it",
        dim,
        heads,
    )
    return heads


def _xcit(tensors: Tensors, num_heads: int | None) -> _Found:
    del num_heads  # the temperatures tell
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
    """The registered name of a family that has these sizes."""
    for name, sizes in _registered(family).items():
        if all(sizes[key] == value for key, value in found.items()):
            return name
    text = ", ".join(f"{key}={value}" for key, value in found.items())
    raise UsageError(f"of {family} with {text} there is none in the registry")


def _head(tensors: Tensors) -> dict[str, Any]:
    """Works for every depth: a single layer is `mlp`, several are `mlp.0`, `mlp.2`, ..."""
    weight_norm = "last_layer.weight_v" in tensors
    linear = [name for name, x in tensors.items() if name.startswith("mlp") and x.ndim == 2]
    first = linear[0] if linear else "mlp.0.weight"
    (out_dim, bottleneck_dim), (hidden_dim, _) = _shapes(
        tensors, {"last_layer.weight_v" if weight_norm else "last_layer.weight": 2, first: 2}
    )
    return {
        "out_dim": out_dim,
        "hidden_dim": hidden_dim if len(linear) > 1 else 2048,  # of no use to a single layer
        "bottleneck_dim": bottleneck_dim,
        "num_layers": len(linear),
        "use_bn": any(name.endswith(".running_mean") for name in tensors),
        "weight_norm": weight_norm,
    }
