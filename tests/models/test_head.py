"""The projection head: the reference's numbers, and properties of its own."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import DINOHead
from dino_jax.models.network import abstract, split
from tests.conftest import parity_cases
from tests.support.reference import recipe_trees

PyTree = Any
CASES = parity_cases("head_*.npz")
TINY = {"in_dim": 12, "out_dim": 40, "hidden_dim": 24, "bottleneck_dim": 16}


def recipe_head(seed: int = 0, **settings: Any) -> DINOHead:
    graphdef, *trees = abstract(lambda rngs: DINOHead(rngs=rngs, **settings))
    head = nnx.merge(graphdef, *recipe_trees(seed, *trees, "head"))
    head.eval()
    return head


def random_features(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_logits_equal_the_reference(path: Path) -> None:
    golden = np.load(path)
    settings = json.loads(str(golden["meta"]))
    seed = settings.pop("seed")
    tag = f"{seed}/head/{json.dumps(settings, sort_keys=True)}"
    shape = (4, settings["in_dim"])
    features = np.random.default_rng(zlib.crc32(tag.encode())).standard_normal(shape)
    settings["num_layers"] = settings.pop("nlayers", 3)
    settings.pop("norm_last_layer", None)  # affects training, but not the logits

    with jax.default_matmul_precision("highest"):
        logits = recipe_head(seed, **settings)(jnp.asarray(features, jnp.float32))
    assert logits.shape == (4, settings["out_dim"])
    np.testing.assert_allclose(logits[:, :512], golden["logits"], rtol=0, atol=2e-5)
    norms = np.linalg.norm(logits, axis=1)
    np.testing.assert_allclose(norms, golden["logits_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "layers", "norms"),
    [
        ({}, [(12, 24), (24, 24), (24, 16)], []),
        ({"num_layers": 1}, [(12, 16)], []),
        ({"num_layers": 1, "use_bn": True}, [(12, 16)], []),
        ({"num_layers": 2, "use_bn": True}, [(12, 24), (24, 16)], [24]),
        ({"num_layers": 4, "use_bn": True}, [(12, 24), *[(24, 24)] * 2, (24, 16)], [24] * 3),
    ],
    ids=str,
)
def test_layers(settings: dict[str, Any], layers: list[tuple[int, int]], norms: list[int]) -> None:
    head = nnx.eval_shape(lambda: DINOHead(rngs=nnx.Rngs(0), **TINY | settings))
    assert [layer.kernel.shape for layer in head.layers] == layers
    assert [norm.scale.shape for norm in head.norms] == [(n,) for n in norms]
    assert head.last_layer.v.shape == (16, 40)
    assert head.last_layer.g.shape == (1, 40)


def test_batch_norm_precedes_each_gelu() -> None:
    head, features = recipe_head(use_bn=True, num_layers=2, **TINY), random_features(64, 12)
    head.train()
    found = head(features)
    linear = features @ head.layers[0].kernel[...] + head.layers[0].bias[...]
    normed = (linear - linear.mean(0)) / jnp.sqrt(linear.var(0) + 1e-5)
    normed = normed * head.norms[0].scale[...] + head.norms[0].bias[...]
    hidden = jax.nn.gelu(normed, approximate=False)
    x = hidden @ head.layers[1].kernel[...] + head.layers[1].bias[...]
    expected = head.last_layer(x / jnp.linalg.norm(x, axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_norms_of_features_and_prototypes_have_no_effect() -> None:
    head = recipe_head(**TINY)
    # Without a bias, scaling the MLP's last layer scales only the norm of its output.
    head.layers[-1].bias[...] = jnp.zeros(16)
    logits = head(features := random_features(5, 12))
    assert jnp.abs(logits).max() <= jnp.abs(head.last_layer.g[...]).max()  # cosines, times g
    head.layers[-1].kernel[...] *= 7.0
    head.last_layer.v[...] *= jnp.linspace(0.5, 3, 40)
    np.testing.assert_allclose(head(features), logits, atol=1e-6)
    head.last_layer.g[...] *= 2.0
    np.testing.assert_allclose(head(features), 2 * logits, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_without_weight_norm_the_prototypes_are_a_linear_layer(dtype: jnp.dtype | None) -> None:
    normalised, features = recipe_head(**TINY), random_features(5, 12)
    head = recipe_head(**TINY, weight_norm=False, dtype=dtype)
    for i, layer in enumerate(normalised.layers):
        layer.kernel[...], layer.bias[...] = head.layers[i].kernel[...], head.layers[i].bias[...]
    kernel = head.last_layer.kernel[...]
    normalised.last_layer.v[...] = kernel
    normalised.last_layer.g[...] = jnp.linalg.norm(kernel, axis=0, keepdims=True)
    logits = head(features)
    assert head.last_layer.bias is None
    assert logits.dtype == jnp.float32
    assert np.std(logits) > 0
    np.testing.assert_allclose(logits, normalised(features), atol=0.02 if dtype else 1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_zero_features_have_finite_logits_and_gradients(num_layers: int) -> None:
    # With zero biases, which are the initial values, the vector to normalise is exactly zero.
    graphdef, params, _ = split(recipe_head(**TINY, num_layers=num_layers))
    for layer in params["layers"].values():
        layer["bias"] *= 0

    def loss(params: PyTree, features: jax.Array) -> jax.Array:
        return jnp.square(nnx.merge(graphdef, params, {})(features) - 1).sum()

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, jnp.zeros((3, 12)))
    assert value == 3 * 40  # every logit is 0
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bfloat16_logits_are_float32_and_accurate() -> None:
    settings = {"in_dim": 64, "out_dim": 512, "hidden_dim": 128, "bottleneck_dim": 64}
    features = random_features(16, 64)
    expected = recipe_head(**settings)(features)
    half = recipe_head(**settings, dtype=jnp.bfloat16)
    assert half.last_layer.v.dtype == jnp.float32
    logits = half(features)
    assert logits.dtype == jnp.float32
    # Logits are g times a cosine. Only the operands are rounded to 8 bits; if the sums were rounded
    # to bfloat16 too, there would be repeated values.
    assert 1e-5 < jnp.abs(logits - expected).max() < 0.02
    assert len(jnp.unique(logits)) > 0.99 * logits.size


def test_initial_weights() -> None:
    settings = {"in_dim": 64, "out_dim": 300, "hidden_dim": 128, "bottleneck_dim": 64}
    head = DINOHead(rngs=nnx.Rngs(0), **settings)
    for layer in head.layers:
        assert abs(np.std(layer.kernel[...]) / 0.02 - 1) < 0.05
        assert not np.any(layer.bias[...])
    v, bound = np.asarray(head.last_layer.v[...]), 1 / 8  # 1 / sqrt(64)
    assert 0.99 * bound < np.abs(v).max() <= bound
    assert abs(v.std() / (bound / np.sqrt(3)) - 1) < 0.05
    assert np.all(head.last_layer.g[...] == 1)


@pytest.mark.parametrize("name", ["out_dim", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_sizes_below_one_are_rejected(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}=0.*all of them must be at least 1"):
        DINOHead(rngs=nnx.Rngs(0), **TINY | {name: 0})
