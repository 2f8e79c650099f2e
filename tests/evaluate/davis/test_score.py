"""J and F scores of simple masks, computed by hand and with SciPy."""

import math

import numpy as np
import pytest
from scipy import ndimage

from dino_jax.evaluate.davis.score import (
    boundary,
    boundary_match,
    dilate,
    object_scores,
    region_overlap,
    statistics,
)

HEIGHT, WIDTH = 300, 400  # a diagonal of 500: boundaries may be 4 pixels off
EMPTY = np.zeros((HEIGHT, WIDTH), bool)


def box(top: int, left: int, height: int = 100, width: int = 100) -> np.ndarray:
    mask = EMPTY.copy()
    mask[top : top + height, left : left + width] = True
    return mask


def test_identical_masks_are_perfect() -> None:
    assert region_overlap(box(50, 60), box(50, 60)) == 1
    assert boundary_match(box(50, 60), box(50, 60)) == 1


def test_empty_masks() -> None:
    assert region_overlap(EMPTY, EMPTY) == boundary_match(EMPTY, EMPTY) == 1
    for pair in ((EMPTY, box(9, 9)), (box(9, 9), EMPTY)):
        assert region_overlap(*pair) == boundary_match(*pair) == 0


@pytest.mark.parametrize(
    ("shift", "right"),
    [
        (1, 400),
        (4, 400),
        # From the ring of 400 pixels: above and below, all but the first 1 or 26 of 101 columns; of
        # the right side, the 4 pixels next to each.
        (5, 2 * 100 + 8),
        (30, 2 * 75 + 8),
        # Side by side: the whole shared side of 101, and 4 columns above and below.
        (100, 101 + 2 * 4),
    ],
)
def test_shifted_by_known_pixels(shift: int, right: int) -> None:
    ours, true = box(50, 60), box(50, 60 + shift)
    assert np.count_nonzero(boundary(ours)) == 400
    assert region_overlap(ours, true) == pytest.approx((100 - shift) / (100 + shift))
    assert boundary_match(ours, true) == pytest.approx(right / 400)


def test_distant_masks_score_zero() -> None:
    assert region_overlap(box(0, 0, 50, 50), box(200, 300, 50, 50)) == 0
    assert boundary_match(box(0, 0, 50, 50), box(200, 300, 50, 50)) == 0


def test_precision_and_recall_by_hand() -> None:
    """One correct line of 10 pixels and one false, distant line: precision 1/2, recall 1."""
    true, ours = np.zeros((30, 60), bool), np.zeros((30, 60), bool)
    true[5, 5:15] = ours[5, 5:15] = True
    ours[25, 5:15] = True
    assert np.count_nonzero(boundary(ours)) == 2 * np.count_nonzero(boundary(true))
    assert boundary_match(ours, true) == pytest.approx(2 / 3)


def test_boundary_by_hand() -> None:
    """The pixels left of, above, and in the last row and column of a box. The frame has none."""
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    expected[2, 2] = False
    np.testing.assert_array_equal(boundary(mask), expected)
    assert not boundary(np.ones((5, 5), bool)).any()
    half = np.zeros((4, 4), bool)
    half[:, 2:] = True
    np.testing.assert_array_equal(np.nonzero(boundary(half))[1], [1, 1, 1, 1])


@pytest.mark.parametrize("radius", [0, 1, 4, 8])
def test_dilation_is_with_a_disk(radius: int) -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.01
    mask[0, 0] = mask[-1, 20] = True  # their disks extend beyond the frame
    steps = np.arange(-radius, radius + 1)
    disk = np.hypot(steps[:, None], steps) <= radius
    np.testing.assert_array_equal(
        dilate(mask, radius), ndimage.binary_dilation(mask, structure=disk)
    )


def test_tolerance_is_rounded_up() -> None:
    """For DAVIS' 854x480 frames, 0.008 * 979.7 = 7.84, so the tolerance is 8 pixels."""
    assert math.ceil(0.008 * math.hypot(480, 854)) == 8
    true, near, far = (np.zeros((480, 854), bool) for _ in range(3))
    true[:200], near[:208], far[:209] = True, True, True
    assert boundary_match(near, true) == 1
    assert boundary_match(far, true) == 0


def test_objects_of_a_frame() -> None:
    truth = (1 * box(0, 0) + 2 * box(150, 200)).astype(np.uint8)
    np.testing.assert_array_equal(object_scores(truth, truth, 2), np.ones((2, 2)))
    missing = np.where(truth == 2, 0, truth)  # the second object was lost
    np.testing.assert_array_equal(object_scores(missing, truth, 2), [[1, 1], [0, 0]])
    swapped = np.array([0, 2, 1], np.uint8)[truth]
    np.testing.assert_array_equal(object_scores(swapped, truth, 2), np.zeros((2, 2)))
    gone = object_scores(missing, missing, 2)  # missing in both maps
    np.testing.assert_array_equal(gone, np.ones((2, 2)))
    half = truth.copy()
    half[:50][truth[:50] == 1] = 0
    assert object_scores(half, truth, 2)[0, 0] == pytest.approx(0.5)


def test_statistics_by_hand() -> None:
    values = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.5, 0.5])
    found = statistics(values)
    assert found.mean == pytest.approx(0.5)
    assert found.recall == pytest.approx(3 / 8)  # exactly one half does not count
    # Split at 0, 2, 4, 5, 7 (1.75, 3.5 and 5.25 rounded): the first three, and the last three.
    assert found.decay == pytest.approx((1 + 0.8 + 0.6) / 3 - (0 + 0.5 + 0.5) / 3)
    assert statistics(np.array([0.7])) == (0.7, 1.0, 0.0)
