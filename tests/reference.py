"""Weights and images of the goldens' recipe, and the reference's tensor names in ours.

Only what the tests need of the naming: dims and layouts follow `tests/goldens/README.md`.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def recipe_tensor(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that torch calls `key`, in torch's layout."""
    rng = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    leaf = key.rsplit(".", 1)[-1]

    def n(scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return (0.5 + rng.random(shape)).astype(np.float32)
    if leaf == "running_mean":
        return n(0.1)
    if leaf == "bias":
        return n(0.02)
    if leaf in ("pos_embed", "cls_token"):
        return n(0.2)
    if leaf in ("weight_g", "temperature"):
        return 1 + n(0.1)
    if leaf.startswith("gamma"):
        return 0.5 + n(0.1)
    if len(shape) == 1:
        return 1 + n(0.1)
    return n(math.prod(shape[1:]) ** -0.5)


def recipe_images(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """Images [B, H, W, 3] of a tag; `shape` is the recipe's [B, 3, H, W]."""
    rng = np.random.default_rng(zlib.crc32(tag.encode()))
    return rng.standard_normal(shape).astype(np.float32).transpose(0, 2, 3, 1)


def our_path(key: str, *, bn_head: bool = False) -> tuple[str | int, ...]:
    """Where a tensor of a ViT or head, named as by torch, lies in our trees."""
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in key.split(".")]
    names = {"weight": "kernel", "running_mean": "mean", "running_var": "var"}
    if m := re.match(r"(head\.)?mlp\.(\d+)\.(\w+)$", key):
        prefix, number, leaf = m.groups()
        per_layer = 3 if bn_head else 2  # linear, (norm,) GELU
        is_norm = bn_head and int(number) % 3 == 1
        head = ["head"] if prefix else []
        leaf = "scale" if is_norm and leaf == "weight" else names.get(leaf, leaf)
        return (*head, "norms" if is_norm else "layers", int(number) // per_layer, leaf)
    if "last_layer" in parts:
        return (*parts[:-1], {"weight_g": "g", "weight_v": "v"}[str(parts[-1])])
    if "patch_embed" in parts:
        return tuple(names.get(str(p), p) for p in parts if p != "proj")
    if any(str(p).startswith("norm") for p in parts):
        return tuple("scale" if p == "weight" else p for p in parts)
    return tuple(names.get(p, p) if isinstance(p, str) else p for p in parts)


def our_layout(key: str, tensor: np.ndarray) -> np.ndarray:
    """A torch tensor in our layout."""
    if key.endswith("patch_embed.proj.weight"):  # [D, C, P, P] -> [P * P * C, D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T if tensor.ndim == 2 else tensor


def torch_layout(key: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `our_layout`."""
    if key.endswith("patch_embed.proj.weight"):
        dim, channels, side, _ = shape
        return array.reshape(side, side, channels, dim).transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def get(tree: PyTree, path: tuple[str | int, ...]) -> jax.Array:
    """The leaf at a path."""
    for part in path:
        tree = tree[part]
    return tree


def fill(tree: PyTree, tensors: dict[str, np.ndarray], *, bn_head: bool = False) -> PyTree:
    """A tree of the same structure filled from torch tensors; every leaf must be met."""
    values = {our_path(k, bn_head=bn_head): our_layout(k, v) for k, v in tensors.items()}

    def leaf(path: tuple[Any, ...], old: Any) -> jax.Array:
        new = values.pop(tuple(p.key for p in path))
        assert new.shape == old.shape, (path, new.shape, old.shape)
        return jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(leaf, tree)
