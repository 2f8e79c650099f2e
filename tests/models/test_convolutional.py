"""Properties of both XCiT and ResNet: BatchNorm over global batches, remat, half precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax import sharding
from dino_jax.models import ResNet, create_model
from dino_jax.models.network import MultiCropModel, Network, abstract, split
from tests.support.reference import recipe_trees

PyTree = Any
B = 8


def xcit(rngs: nnx.Rngs, **settings: Any) -> nnx.Module:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    return create_model("xcit_tiny_12_p8", rngs=rngs, **sizes, **settings)


def resnet(rngs: nnx.Rngs, **settings: Any) -> nnx.Module:
    model = ResNet(depths=(1, 1, 1, 1), bottleneck=False, rngs=rngs, **settings)
    model.eval()
    return model


@pytest.fixture(scope="module", params=[xcit, resnet], ids=["xcit", "resnet"])
def build(request: pytest.FixtureRequest) -> Callable[..., nnx.Module]:
    return request.param


@functools.cache
def weights(build: Callable[..., nnx.Module]) -> tuple[PyTree, PyTree]:
    return recipe_trees(0, *abstract(build)[1:], build.__name__)


def structure(build: Callable[..., nnx.Module], *, train: bool, **settings: Any) -> nnx.GraphDef:
    def made(rngs: nnx.Rngs) -> nnx.Module:
        model = build(rngs, **settings)
        model.train() if train else model.eval()
        return model

    return abstract(made)[0]


@functools.partial(jax.jit, static_argnums=0)
def run(
    graphdef: nnx.GraphDef, params: PyTree, stats: PyTree, images: jax.Array
) -> tuple[jax.Array, PyTree]:
    model = nnx.merge(graphdef, params, stats)
    return model(images), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def images(side: int = 32) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((B, side, side, 3)).astype(np.float32)
    return noise * np.linspace(0.2, 2, B, dtype=np.float32)[:, None, None, None]


def assert_close(found: PyTree, expected: PyTree, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_eight_devices_use_the_statistics_of_the_global_batch(build: Callable) -> None:
    graphdef, (params, stats) = structure(build, train=True), weights(build)
    expected = run(graphdef, params, stats, images())
    mesh = sharding.make_mesh()
    everywhere = jax.device_put((params, stats), sharding.replicated(mesh))
    spread = jax.device_put(images(), sharding.batch_sharded(mesh))
    assert mesh.size == 8
    assert_close(run(graphdef, *everywhere, spread), expected, rtol=1e-4, atol=1e-4)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), expected[1], stats)
    assert all(jax.tree.leaves(moved))


def test_statistics_are_updated_with_global_crops_and_then_with_local_ones(
    build: Callable,
) -> None:
    (params, stats), one_crop = weights(build), structure(build, train=True)
    globals_, locals_ = images(32)[:, None], 3 * images(16)[:, None]
    model = MultiCropModel(nnx.merge(one_crop, params, stats), lambda features: features)
    graphdef, all_params, all_stats = split(model)
    _, after = jax.jit(Network(graphdef))(all_params, all_stats, (globals_, locals_))
    _, between = run(one_crop, params, stats, globals_[:, 0])
    _, expected = run(one_crop, params, between, locals_[:, 0])
    assert_close(after["backbone"], expected, rtol=1e-4, atol=1e-5)
    _, between = run(one_crop, params, stats, locals_[:, 0])
    _, reversed_ = run(one_crop, params, between, globals_[:, 0])
    differ = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-2, expected, reversed_)
    assert any(jax.tree.leaves(differ))


def test_in_evaluation_mode_statistics_are_fixed_and_images_independent(build: Callable) -> None:
    graphdef, (params, stats) = structure(build, train=False), weights(build)
    features, after = run(graphdef, params, stats, images())
    assert_close(after, stats, rtol=0)
    alone, _ = run(graphdef, params, stats, images()[:1])
    np.testing.assert_allclose(features[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
def test_remat_recomputes_and_changes_no_number(build: Callable) -> None:
    params, stats = weights(build)
    results, work = {}, {}
    for policy in ("none", "dots", "full"):
        graphdef = structure(build, train=True, remat=policy)

        def loss(params: PyTree, graphdef: nnx.GraphDef = graphdef) -> tuple[jax.Array, PyTree]:
            features, after = run(graphdef, params, stats, images())
            return jnp.square(features).mean(), after

        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params)
        work[policy] = step.cost_analysis()["flops"]
        results[policy] = jax.device_get(step.compile()(params))
    assert work["none"] < work["dots"] < work["full"]
    for policy in ("dots", "full"):  # this includes statistics, which are updated only once
        assert_close(results[policy], results["none"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_model_can_be_a_constant_of_a_jitted_function(build: Callable, remat: str) -> None:
    params, stats = weights(build)
    model = nnx.merge(structure(build, train=False, remat=remat), params, stats)
    expected, _ = run(structure(build, train=False), params, stats, images())
    features = jax.jit(lambda images: model(images))(images())
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda images: jnp.square(model(images)).mean()))(images())
    assert np.abs(slopes).max() > 0


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_computes_in_half_and_keeps_float32(build: Callable, train: bool) -> None:
    params, stats = weights(build)
    full, _ = run(structure(build, train=train), params, stats, images())
    half, after = run(structure(build, train=train, dtype=jnp.bfloat16), params, stats, images())
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    assert 1e-5 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05
