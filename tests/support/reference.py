"""Weights and images from the goldens' recipe; see `tests/goldens/README.md`."""

import functools
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dino_jax.models import MODELS, create_model
from dino_jax.models.network import abstract, split
from dino_jax.weights.layouts.mapping import shape_problems, to_ours, torch_shapes

PyTree = Any


def recipe_tensor(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor with torch's name `key`, in torch's layout."""
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
    """The images [B, H, W, 3] for a tag; `shape` is [B, 3, H, W], as in the recipe."""
    rng = np.random.default_rng(zlib.crc32(tag.encode()))
    return rng.standard_normal(shape).astype(np.float32).transpose(0, 2, 3, 1)


def recipe_trees(
    seed: int, params: PyTree, batch_stats: PyTree, family: str, *, prefix: str = ""
) -> tuple[PyTree, PyTree]:
    """The recipe's weights, in trees with the given shapes.

    Args:
      seed: the seed of the recipe.
      params: parameters with the shapes; may be abstract.
      batch_stats: running statistics with the shapes; may be abstract.
      family: a key of `dino_jax.weights.layouts.dino.FAMILIES`.
      prefix: the prefix of torch's names.
    """
    tensors = {
        name: recipe_tensor(seed, prefix + name, empty.shape)
        for name, empty in torch_shapes(params, batch_stats, family).items()
    }
    *trees, _ = to_ours(tensors, family)
    assert shape_problems(trees[0], params) + shape_problems(trees[1], batch_stats) == []
    return jax.tree.map(jnp.asarray, trees[0]), jax.tree.map(jnp.asarray, trees[1])


@functools.lru_cache(maxsize=1)
def recipe_model(arch: str, seed: int = 0, **overrides: Any) -> nnx.Module:
    """A backbone with the recipe's weights, in evaluation mode."""
    graphdef, params, stats = abstract(lambda rngs: create_model(arch, rngs=rngs, **overrides))
    family = MODELS[arch].func.family
    return nnx.merge(graphdef, *recipe_trees(seed, params, stats, family))


@functools.partial(jax.jit, static_argnums=(0, 1))
def traced(
    method: Callable, graphdef: nnx.GraphDef, params: PyTree, stats: PyTree, *args: Any
) -> Any:
    """Calls a method of the model made from a graphdef and arrays."""
    return method(nnx.merge(graphdef, params, stats), *args)


def call(method: Callable, model: nnx.Module, *args: Any) -> Any:
    """A method's result as NumPy arrays; compiles once per structure and shape."""
    return jax.device_get(traced(method, *split(model), *args))


def random_images(*shape: int) -> np.ndarray:
    """Noise images [B, H, W, C] from a fixed seed."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def image_keys(number: int) -> jax.Array:
    """Keys [B] for stochastic depth."""
    return jax.random.split(jax.random.key(1), number)


def assert_forward_equals(path: Path, tolerance: float) -> None:
    """Compares the features and parameter count of an XCiT or ResNet with its golden."""
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    arch, size = meta["arch"], tuple(meta["size"])
    model = recipe_model(arch, meta["seed"])
    assert sum(p.size for p in jax.tree.leaves(split(model)[1])) == meta["params"]
    images = recipe_images(f"{meta['seed']}/{arch}/{size}", (2, 3, *size))
    with jax.default_matmul_precision("highest"):
        features = call(type(model).__call__, model, images)
    np.testing.assert_allclose(features, golden["cls"], rtol=0, atol=tolerance)


def assert_full_precision(lowered: str) -> None:
    """Asserts that all matrix products of a lowered function have full precision."""
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
