"""Batch normalisation, compared with its formula and, if it is installed, with torch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dino_jax import sharding
from dino_jax.models.batch_norm import BatchNorm
from dino_jax.models.network import split

PyTree = Any
FEATURES = 5


def random_inputs(*shape: int) -> np.ndarray:
    return 3 + 2 * np.random.default_rng(0).standard_normal((*shape, FEATURES)).astype(np.float32)


def norm(**settings: object) -> BatchNorm:
    """A BatchNorm with all variables different from their initial values."""
    module = BatchNorm(FEATURES, rngs=nnx.Rngs(0), **settings)
    for variable, start in [(module.scale, 1.0), (module.bias, -2.0), (module.mean, 0.3)]:
        variable[...] = start + 0.1 * jnp.arange(FEATURES)
    module.var[...] = 0.5 + 0.2 * jnp.arange(FEATURES)
    return module


def test_training_normalises_with_the_batch_and_updates_the_statistics() -> None:
    module, x = norm(), random_inputs(4, 6)
    scale, bias, mean, var = map(np.asarray, (module.scale, module.bias, module.mean, module.var))
    y = module(jnp.asarray(x))
    rows = x.reshape(-1, FEATURES)
    normed = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(-1, FEATURES), normed * scale + bias, atol=1e-5)
    np.testing.assert_allclose(module.mean, 0.9 * mean + 0.1 * rows.mean(0), rtol=1e-6)
    unbiased = rows.var(0, ddof=1)
    np.testing.assert_allclose(module.var, 0.9 * var + 0.1 * unbiased, rtol=1e-6)


def test_evaluation_uses_the_running_statistics_without_updating_them() -> None:
    module, x = norm(), random_inputs(8)
    module.eval()
    scale, bias, mean, var = map(np.asarray, (module.scale, module.bias, module.mean, module.var))
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, atol=1e-5)
    np.testing.assert_array_equal(module.mean, mean)
    np.testing.assert_array_equal(module.var, var)


def test_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    module, theirs, x = norm(), torch.nn.BatchNorm1d(FEATURES), random_inputs(16)
    ours = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    state = {key: torch.tensor(np.asarray(getattr(module, name))) for key, name in ours.items()}
    theirs.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    leaf = torch.tensor(x, requires_grad=True)
    expected = theirs(leaf)
    expected.sin().sum().backward()
    graphdef, params, stats = split(module)

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, params, stats)(x)
        return jnp.sin(y).sum(), y

    grads, y = jax.grad(loss, has_aux=True)(jnp.asarray(x))
    module(jnp.asarray(x))
    np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(grads, leaf.grad.numpy(), atol=1e-5)
    for key, name in ours.items():
        np.testing.assert_allclose(
            getattr(module, name), theirs.state_dict()[key].numpy(), rtol=1e-5, err_msg=name
        )


def test_a_sharded_batch_has_global_statistics() -> None:
    mesh, x = sharding.make_mesh(), random_inputs(16)
    x *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None]  # different on every device
    graphdef, params, stats = split(norm())

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        module = nnx.merge(graphdef, params, stats)
        return module(x), module.mean[...], module.var[...]

    spread = run(jax.device_put(x, sharding.batch_sharded(mesh)))
    for found, expected in zip(spread, run(jnp.asarray(x)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_spread_pass_has_global_statistics() -> None:
    """And the right gradients, which pass through the statistics to earlier layers."""
    mesh, x = sharding.make_mesh(), random_inputs(16)
    x *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None]
    graphdef, norm_params, stats = split(norm())
    mixing = np.random.default_rng(1).standard_normal((FEATURES, FEATURES)).astype(np.float32)
    params = {"norm": norm_params, "mixing": mixing}

    def run(weights: tuple[PyTree, PyTree], stats: PyTree, x: jax.Array) -> tuple[PyTree, ...]:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            module = nnx.merge(graphdef, params["norm"], stats)
            value = jnp.sin(3 * module(x @ params["mixing"])).mean()
            return value, split(module)[2]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(weights[0])
        return grads, value, stats

    layout = sharding.PassLayout(mesh, jax.tree.map(lambda _: PartitionSpec(), params))
    expected = run((params, params), stats, x)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(expected[0]))
    spread = jax.jit(sharding.spread_pass(run, layout))((params, params), stats, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), spread, expected)


def test_half_precision_keeps_float32_statistics() -> None:
    module = norm(dtype=jnp.bfloat16)
    # Far from zero, where bfloat16 is too coarse for the statistics.
    x = (1000 + 8 * random_inputs(64)).astype(jnp.bfloat16)
    y = module(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    assert module.mean.dtype == module.var.dtype == jnp.float32
    rows = np.asarray(x, np.float32)
    normed = (rows - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), normed * np.asarray(module.scale) + module.bias, atol=0.05
    )


def test_a_batch_of_one_has_no_unbiased_variance_and_stays_finite() -> None:
    module = norm()
    y = module(jnp.asarray(random_inputs(1)))
    np.testing.assert_allclose(y[0], module.bias, atol=1e-5)
    assert jnp.isfinite(module.var[...]).all()


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_a_constant_feature_gives_the_bias_and_finite_gradients(value: float) -> None:
    graphdef, params, stats = split(norm())
    x = jnp.full((4, FEATURES), value)
    y, pullback = jax.vjp(lambda x: nnx.merge(graphdef, params, stats)(x), x)
    np.testing.assert_allclose(y, np.broadcast_to(params["bias"], y.shape), atol=1e-3)
    assert jnp.isfinite(pullback(y)[0]).all()
