"""Rematerialisation in a Vision Transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.models.network import split
from tests.support.reference import image_keys, random_images
from tests.support.tiny_vit import features, tiny

PyTree = Any


@pytest.mark.compiler
def test_remat_policies_recompute_and_change_no_number() -> None:
    images, keys = random_images(2, 16, 16, 3), image_keys(2)
    _, params, _ = split(tiny())

    def loss(policy: str) -> Callable[[PyTree], jax.Array]:
        graphdef, _, _ = split(tiny(drop_path_rate=0.3, remat=policy))
        return lambda p: jnp.square(nnx.merge(graphdef, p, {})(images, keys)).mean()

    attention, hidden, block_input = (2, 4, 17, 17), (2, 17, 128), (2, 17, 32)
    results, work, kept = {}, {}, {}
    for policy in ("none", "dots", "full"):
        # What the forward pass saves for the backward pass.
        pullback = jax.eval_shape(lambda p, policy=policy: jax.vjp(loss(policy), p)[1], params)
        kept[policy] = {leaf.shape for leaf in jax.tree.leaves(pullback)}
        step = jax.jit(jax.value_and_grad(loss(policy))).lower(params)
        work[policy] = step.cost_analysis()["flops"]
        results[policy] = jax.device_get(step.compile()(params))
    assert {attention, hidden, block_input} <= kept["none"]
    assert {hidden, block_input} <= kept["dots"]
    assert attention not in kept["dots"]
    assert block_input in kept["full"]
    assert not {attention, hidden} & kept["full"]
    assert work["none"] < work["dots"] < work["full"]
    for policy in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            results[policy],
            results["none"],
        )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_model_can_be_a_constant_of_a_jitted_function(remat: str) -> None:
    model, images = tiny(remat=remat), random_images(2, 16, 16, 3)
    expected = features(tiny(), images)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(images), expected, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda x: jnp.square(model(x)).mean()))(images)
    assert np.abs(slopes).max() > 0
