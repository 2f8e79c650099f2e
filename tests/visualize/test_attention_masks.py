"""Masks from attention maps."""

from pathlib import Path

import numpy as np
import pytest

from dino_jax.visualize.attention_masks import mass_mask, to_pixels
from tests.conftest import parity_cases

CASES = parity_cases("attention_mask*.npz")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    mask = mass_mask(golden["attention"], float(golden["threshold"]))
    np.testing.assert_array_equal(mask, golden["mask"])


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95])
def test_mask_contains_the_mass_with_the_fewest_patches(threshold: float) -> None:
    maps = np.random.default_rng(0).exponential(size=(4, 5, 7)) ** 2
    for values, mask in zip(maps, mass_mask(maps, threshold), strict=True):
        kept = values[mask]
        assert kept.min() > values[~mask].max(initial=0)
        assert kept.sum() >= threshold * values.sum() > kept.sum() - kept.min()


def test_pixels_equal_their_patch() -> None:
    patches = np.arange(6).reshape(1, 2, 3)
    pixels = to_pixels(patches, 2, (3, 5))  # the last patches are cropped
    expected = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    np.testing.assert_array_equal(pixels, [expected])
