"""Crop plans: probabilities, strengths, and independence of the random numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.data.transforms.multicrop import CropPlan, CropSettings
from tests.support.crop_plans import SMALL, plan

NUMBER = 4000  # images in each statistic
ALWAYS = CropSettings(
    local_number=2,
    brightness=1.5,
    flip_prob=1.0,
    jitter_prob=1.0,
    gray_prob=1.0,
    blur_prob=(1.0, 1.0, 1.0),
    solarize_prob=1.0,
)
NEVER = CropSettings(
    local_number=2,
    flip_prob=0.0,
    jitter_prob=0.0,
    gray_prob=0.0,
    blur_prob=(0.0, 0.0, 0.0),
    solarize_prob=0.0,
)


def plans_of(settings: CropSettings) -> tuple[CropPlan, CropPlan]:
    """Global and local plans for many images of 60x80 pixels, as NumPy arrays."""
    keys = jax.random.split(jax.random.key(1), NUMBER)
    return jax.device_get(plan(keys, jnp.tile(jnp.array([[60, 80]]), (NUMBER, 1)), settings))


def test_plans_have_the_right_probabilities() -> None:
    """Within four standard deviations of 4000 images."""
    globals_, locals_ = plans_of(SMALL)

    def check(events: np.ndarray, probability: float) -> None:
        slack = 4 * math.sqrt(probability * (1 - probability) / events.size)
        assert abs(events.mean() - probability) <= slack

    for crops in (globals_, locals_):
        check(crops.flip, 0.5)
        check(crops.gray, 0.2)
        check((crops.factors != [1, 1, 1, 0]).any(axis=-1), 0.8)
        orders, counts = np.unique(crops.order.reshape(-1, 4), axis=0, return_counts=True)
        assert orders.tolist() == [list(order) for order in itertools.permutations(range(4))]
        mean = counts.sum() / 24
        assert np.abs(counts - mean).max() < 5 * math.sqrt(mean)
    check(globals_.blur_radius[:, 0] > 0, 1.0)
    check(globals_.blur_radius[:, 1] > 0, 0.1)
    check(locals_.blur_radius > 0, 0.5)
    check(globals_.solarize[:, 0], 0.0)
    check(globals_.solarize[:, 1], 0.2)
    check(locals_.solarize, 0.0)


def test_plans_have_the_right_strengths() -> None:
    globals_, _ = plans_of(ALWAYS)
    bounds = [(0.0, 2.5), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for strength, (low, high) in zip(globals_.factors.reshape(-1, 4).T, bounds, strict=True):
        assert low <= strength.min() < low + 0.01 * (high - low)
        assert high >= strength.max() > high - 0.01 * (high - low)
        assert abs(strength.mean() - (low + high) / 2) < 0.02 * (high - low)
    radius = globals_.blur_radius[:, 0]
    assert 0.1 <= radius.min() < 0.12
    assert 1.98 < radius.max() <= 2.0


def test_draws_are_independent() -> None:
    """An image's random numbers are uncorrelated, within a crop and between crops."""
    globals_, locals_ = plans_of(ALWAYS)
    columns = [
        values
        for crops in (globals_, locals_)
        for n in range(2)
        for values in (
            *crops.box[:, n, 2:].T,
            *crops.factors[:, n].T,
            crops.order[:, n, 0],
            crops.blur_radius[:, n],
        )
    ]
    related = np.abs(np.corrcoef(np.array(columns, np.float64)))
    for first in range(0, len(columns), 8):
        related[first : first + 2, first : first + 2] = 0  # height and width share the area
    np.fill_diagonal(related, 0)
    assert related.max() < 0.08


@pytest.mark.parametrize("settings", [ALWAYS, NEVER])
def test_always_and_never(settings: CropSettings) -> None:
    always = settings is ALWAYS
    globals_, locals_ = plans_of(settings)
    for crops in (globals_, locals_):
        assert (crops.flip == always).all()
        assert (crops.gray == always).all()
        assert ((crops.blur_radius > 0) == always).all()
        assert ((crops.factors != [1, 1, 1, 0]).any(axis=-1) == always).all()
    assert (globals_.solarize == [[False, always]]).all()
    assert not locals_.solarize.any()
