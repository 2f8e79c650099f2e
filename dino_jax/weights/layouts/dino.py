"""Tables of torch's and our tensor names and layouts, one or more per family of networks.

A row is `torch name: (our path, layout)`. Braces stand for a number: `{i}` is any number, and
`{2i+1}` is computed from the same i. Rows are in the order of the reference's modules and files. A
family with several tables has variants; a network belongs to the one that it matches.

Layouts: O output and I input features, H and W pixels of a kernel.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np

from dino_jax.errors import UsageError


class Layout(NamedTuple):
    """How to convert a tensor between torch's layout and ours."""

    ndim: int  # axes of torch's tensor
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, int], np.ndarray]  # takes an array and the image channels


def _patches_to_torch(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    side = round((kernel.shape[0] / in_channels) ** 0.5)
    if kernel.shape[0] != side * side * in_channels:
        raise UsageError(
            f"a patch embedding with {kernel.shape[0]} inputs cannot have square patches with "
            f"in_channels={in_channels}: use the in_channels of the model"
        )
    return kernel.reshape(side, side, in_channels, -1).transpose(3, 2, 0, 1)


COUNT = Layout(0, lambda x: x, lambda x, _: x)
VECTOR = Layout(1, lambda x: x, lambda x, _: x)
CUBE = Layout(3, lambda x: x, lambda x, _: x)
LINEAR = Layout(2, lambda x: x.T, lambda x, _: x.T)  # [O, I] and [I, O]
CONV = Layout(  # [O, I, H, W] and [H, W, I, O]
    4, lambda x: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1)
)
PATCHES = Layout(  # [O, I, H, W] and [H * W * I, O]
    4, lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _patches_to_torch
)

Table = dict[str, tuple[str, Layout]]


def _vectors(torch: str, ours: str, *names: str) -> Table:
    return {f"{torch}.{name}": (f"{ours}.{name}", VECTOR) for name in names}


def _weight_and_bias(torch: str, ours: str, layout: Layout) -> Table:
    return {
        f"{torch}.weight": (f"{ours}.kernel", layout),
        f"{torch}.bias": (f"{ours}.bias", VECTOR),
    }


def _layer_norm(torch: str, ours: str) -> Table:
    return {
        f"{torch}.weight": (f"{ours}.scale", VECTOR),
        f"{torch}.bias": (f"{ours}.bias", VECTOR),
    }


def _batch_norm(torch: str, ours: str) -> Table:
    return {
        **_layer_norm(torch, ours),
        f"{torch}.running_mean": (f"{ours}.mean", VECTOR),
        f"{torch}.running_var": (f"{ours}.var", VECTOR),
        f"{torch}.num_batches_tracked": (f"{ours}.count", COUNT),
    }


def _conv_norm(torch_conv: str, torch_norm: str, ours: str) -> Table:
    return {
        f"{torch_conv}.weight": (f"{ours}.conv.kernel", CONV),
        **_batch_norm(torch_norm, f"{ours}.norm"),
    }


def _attention_and_mlp(torch: str, ours: str) -> Table:
    """The rows of every block after its first norm."""
    return {
        **_weight_and_bias(f"{torch}.attn.qkv", f"{ours}.attn.qkv", LINEAR),
        **_weight_and_bias(f"{torch}.attn.proj", f"{ours}.attn.proj", LINEAR),
        **_layer_norm(f"{torch}.norm2", f"{ours}.norm2"),
        **_weight_and_bias(f"{torch}.mlp.fc1", f"{ours}.mlp.fc1", LINEAR),
        **_weight_and_bias(f"{torch}.mlp.fc2", f"{ours}.mlp.fc2", LINEAR),
    }


VIT: Table = {
    "cls_token": ("cls_token", CUBE),
    "pos_embed": ("pos_embed", CUBE),
    **_weight_and_bias("patch_embed.proj", "patch_embed", PATCHES),
    **_layer_norm("blocks.{i}.norm1", "blocks.{i}.norm1"),
    **_attention_and_mlp("blocks.{i}", "blocks.{i}"),
    **_layer_norm("norm", "norm"),
}

_XCA = "blocks.{i}"  # the same name on both sides
_CLASS, _OUR_CLASS = "cls_attn_blocks.{i}", "class_blocks.{i}"
XCIT: Table = {
    "cls_token": ("cls_token", CUBE),
    **_conv_norm("patch_embed.proj.{2i}.0", "patch_embed.proj.{2i}.1", "patch_embed.layers.{i}"),
    **_vectors(_XCA, _XCA, "gamma1", "gamma2", "gamma3"),
    **_layer_norm(f"{_XCA}.norm1", f"{_XCA}.norm1"),
    f"{_XCA}.attn.temperature": (f"{_XCA}.attn.temperature", CUBE),
    **_attention_and_mlp(_XCA, _XCA),
    **_layer_norm(f"{_XCA}.norm3", f"{_XCA}.norm3"),
    **_weight_and_bias(f"{_XCA}.local_mp.conv1", f"{_XCA}.local.conv1", CONV),
    **_batch_norm(f"{_XCA}.local_mp.bn", f"{_XCA}.local.norm"),
    **_weight_and_bias(f"{_XCA}.local_mp.conv2", f"{_XCA}.local.conv2", CONV),
    **_vectors(_CLASS, _OUR_CLASS, "gamma1", "gamma2"),
    **_layer_norm(f"{_CLASS}.norm1", f"{_OUR_CLASS}.norm1"),
    **_attention_and_mlp(_CLASS, _OUR_CLASS),
    **_layer_norm("norm", "norm"),
    **_weight_and_bias("pos_embeder.token_projection", "position_projection", CONV),
}


def _resnet(convs: int) -> Table:
    """A ResNet with `convs` convolutions in every block."""
    torch, ours = "layer{s+1}.{b}", "stages.{s}.{b}"
    table = _conv_norm("conv1", "bn1", "stem")
    for i in range(convs):
        table |= _conv_norm(f"{torch}.conv{i + 1}", f"{torch}.bn{i + 1}", f"{ours}.layers.{i}")
    return table | _conv_norm(f"{torch}.downsample.0", f"{torch}.downsample.1", f"{ours}.shortcut")


# Torch numbers the linear layers, norms and GELUs of an MLP consecutively. A single layer has no
# number.
_MLPS: tuple[Table, ...] = (
    _weight_and_bias("mlp", "layers.0", LINEAR),
    _weight_and_bias("mlp.{2i}", "layers.{i}", LINEAR),
    _weight_and_bias("mlp.{3i}", "layers.{i}", LINEAR) | _batch_norm("mlp.{3i+1}", "norms.{i}"),
)
_LAST_LAYERS: tuple[Table, ...] = (
    {
        "last_layer.weight_g": ("last_layer.g", LINEAR),
        "last_layer.weight_v": ("last_layer.v", LINEAR),
    },
    {"last_layer.weight": ("last_layer.kernel", LINEAR)},  # without weight normalization
)

FAMILIES: dict[str, tuple[Table, ...]] = {
    "vit": (VIT,),
    "xcit": (XCIT,),
    "resnet": (_resnet(convs=2), _resnet(convs=3)),  # basic blocks, bottlenecks
    "head": tuple(mlp | last for mlp, last in product(_MLPS, _LAST_LAYERS)),
}
