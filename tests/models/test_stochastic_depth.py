"""Stochastic depth in a Vision Transformer."""

import jax.numpy as jnp
import numpy as np

from dino_jax.models.layers import drop_path
from tests.support.reference import image_keys, random_images
from tests.support.tiny_vit import features, tiny


def test_rates_increase_linearly_with_depth() -> None:
    rates = [block.drop_path_rate for block in tiny(depth=5, drop_path_rate=0.2).blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 5), rtol=1e-12)


def test_a_branch_is_dropped_at_its_rate_and_keeps_its_mean() -> None:
    draw = np.random.default_rng(0).random(20_000, dtype=np.float32)
    dropped = np.asarray(drop_path(jnp.ones((20_000, 1, 1)), jnp.asarray(draw), 0.3))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert abs((dropped == 0).mean() - 0.3) < 0.01
    assert abs(dropped.mean() - 1) < 0.015


def test_branches_are_dropped_independently() -> None:
    # Rates 0, 1/4, 1/2: four branches can be dropped, so one image has sixteen outcomes.
    model = tiny(depth=3, drop_path_rate=0.5)
    images = np.broadcast_to(random_images(1, 4, 4, 3), (600, 4, 4, 3))
    outcomes = features(model, images, image_keys(600))
    assert len(np.unique(outcomes.round(4), axis=0)) == 16


def test_drops_depend_on_the_images_own_key_only() -> None:
    model = tiny(drop_path_rate=0.5)
    images, keys = random_images(8, 16, 16, 3), image_keys(8)
    dropped = features(model, images, keys)
    assert (np.abs(dropped - features(model, images)).max(1) > 1e-3).any()
    order = np.random.default_rng(0).permutation(8)
    shuffled = features(model, images[order], keys[order])
    np.testing.assert_allclose(shuffled, dropped[order], atol=1e-5)
    some = features(model, images[2:5], keys[2:5])
    np.testing.assert_allclose(some, dropped[2:5], atol=1e-5)


def test_without_keys_nothing_is_dropped() -> None:
    images = random_images(8, 16, 16, 3)
    without = features(tiny(), images)
    np.testing.assert_array_equal(features(tiny(drop_path_rate=0.9), images), without)
    with_keys = features(tiny(drop_path_rate=0.0), images, image_keys(8))
    np.testing.assert_array_equal(with_keys, without)
