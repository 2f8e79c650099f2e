"""Multi-crop forward passes as pure functions, on one device and on eight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax import sharding
from dino_jax.models import DINOHead, VisionTransformer
from dino_jax.models.network import MultiCropModel, Network, abstract, split
from tests.support.collectives import moved

PyTree = Any
B, D, K = 8, 16, 24


def build(rngs: nnx.Rngs) -> MultiCropModel:
    backbone = VisionTransformer(
        patch_size=4, image_size=8, embed_dim=D, depth=2, num_heads=2, drop_path_rate=0.5, rngs=rngs
    )
    head = DINOHead(D, K, hidden_dim=20, bottleneck_dim=12, num_layers=2, rngs=rngs)
    return MultiCropModel(backbone, head)


def make() -> tuple[nnx.GraphDef, PyTree]:
    """A model with weights large enough that all its parts affect the output."""
    graphdef, params, _ = abstract(build)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda p: 0.3 * rng.standard_normal(p.shape).astype(np.float32), params
    )


@pytest.fixture(scope="module")
def views() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return tuple(
        rng.standard_normal((B, number, side, side, 3)).astype(np.float32)
        for number, side in [(2, 8), (3, 4)]
    )


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), B)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef: nnx.GraphDef, params: PyTree, *args: PyTree) -> jax.Array:
    return Network(graphdef)(params, {}, *args)[0]


def test_logits_equal_those_of_one_crop_at_a_time(views: tuple[np.ndarray, ...]) -> None:
    graphdef, params = make()
    logits = logits_of(graphdef, params, views)
    assert logits.shape == (B, 5, K)
    one_crop = jax.jit(lambda p, x: (m := nnx.merge(graphdef, p, {})).head(m.backbone(x)))
    crops = [(group, i) for group in views for i in range(group.shape[1])]
    for v, (group, i) in enumerate(crops):
        np.testing.assert_allclose(logits[:, v], one_crop(params, group[:, i]), atol=1e-5)


def test_drops_depend_on_the_images_key_and_differ_between_views(
    views: tuple[np.ndarray, ...], keys: jax.Array
) -> None:
    graphdef, params = make()
    same = tuple(np.repeat(group[:, :1], group.shape[1], axis=1) for group in views)
    logits = np.asarray(logits_of(graphdef, params, same, keys))
    order = np.random.default_rng(0).permutation(B)
    shuffled = logits_of(graphdef, params, tuple(group[order] for group in same), keys[order])
    np.testing.assert_allclose(shuffled, logits[order], atol=1e-5)
    # The two global views are equal, and so are the three local ones, except for dropped branches.
    for first, number in [(0, 2), (2, 3)]:
        pairs = [(v, w) for v in range(first, first + number) for w in range(first, v)]
        assert all(np.abs(logits[:, v] - logits[:, w]).max() > 1e-3 for v, w in pairs)
    without = np.asarray(logits_of(graphdef, params, same))
    np.testing.assert_allclose(without[:, 0], without[:, 1], atol=1e-6)


def pixel_means(images: jax.Array, keys: jax.Array | None) -> jax.Array:
    """A backbone without parameters: [B, H, W, 3] -> [B, 3]."""
    del keys
    return images.mean((1, 2))


def test_statistics_are_updated_once_with_all_views(views: tuple[np.ndarray, ...]) -> None:
    head = DINOHead(3, K, hidden_dim=4, num_layers=2, use_bn=True, rngs=nnx.Rngs(0))
    model = MultiCropModel(pixel_means, head)
    model.train()
    graphdef, params, stats = split(model)
    before = jax.device_get(stats)
    _, after = Network(graphdef)(params, stats, tuple(jnp.asarray(group) for group in views))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(stats), before)
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    # The head, including its BatchNorm, gets the features of all views as one batch.
    features = np.concatenate([group.mean((2, 3)).reshape(-1, 3) for group in views])
    hidden = features @ np.asarray(params["head"]["layers"][0]["kernel"])
    after = after["head"]["norms"][0]
    np.testing.assert_allclose(after["mean"], 0.1 * hidden.mean(0), atol=1e-7)
    np.testing.assert_allclose(after["var"], 0.9 + 0.1 * hidden.var(0, ddof=1), rtol=1e-6)


def test_abstract_equals_split_but_has_only_shapes() -> None:
    def head(rngs: nnx.Rngs) -> DINOHead:
        return DINOHead(3, K, hidden_dim=4, num_layers=2, use_bn=True, rngs=rngs)

    graphdef, *trees = abstract(head)
    built_graphdef, *built_trees = split(head(nnx.Rngs(0)))
    assert graphdef == built_graphdef
    assert {type(leaf) for leaf in jax.tree.leaves(trees)} == {jax.ShapeDtypeStruct}
    shapes, built_shapes = (
        jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (trees, built_trees)
    )
    assert shapes == built_shapes


@pytest.mark.compiler
def test_a_forward_pass_on_eight_devices_needs_no_communication(
    views: tuple[np.ndarray, ...], keys: jax.Array
) -> None:
    graphdef, params = make()
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    spread = jax.device_put((views, keys), sharding.batch_sharded(mesh))
    everywhere = jax.device_put(params, sharding.replicated(mesh))
    compiled = logits_of.lower(graphdef, everywhere, *spread).compile()
    assert not moved(compiled.as_text())
    logits = compiled(everywhere, *spread)
    assert logits.sharding.is_equivalent_to(sharding.batch_sharded(mesh), logits.ndim)
    np.testing.assert_allclose(logits, logits_of(graphdef, params, views, keys), atol=1e-5)
