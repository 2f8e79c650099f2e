"""J and F: how well the label maps of a video match the true ones.

The measures of DAVIS 2017 (Pont-Tuset et al., https://arxiv.org/abs/1704.00675; Perazzi et al.
2016): J is the intersection over union of the region of an object and the true region. F is the
harmonic mean of precision and recall of its boundary, where a small distance is tolerated. Both are
between 0 and 1.

Dims: H, W pixels, O objects, T frames.
"""

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 0.008  # tolerated distance of boundaries, as a share of the image diagonal
VOID = 255  # label of pixels that belong to no object


class Statistics(NamedTuple):
    """One measure of one object over a sequence."""

    mean: float
    recall: float  # share of frames above one half
    decay: float  # mean of the first quarter of the frames minus that of the last


def object_scores(labels: np.ndarray, truth: np.ndarray, num_objects: int) -> np.ndarray:
    """J and F of every object in a frame.

    Args:
      labels: [H, W] uint8, 0 for the background.
      truth: likewise.
      num_objects: O; objects are labelled from 1.
    Returns: [O, 2] float64. An object that is in neither map scores 1.
    """
    return np.array(
        [
            (region_overlap(labels == i, truth == i), boundary_match(labels == i, truth == i))
            for i in range(1, num_objects + 1)
        ]
    )


def region_overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two [H, W] bool masks; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return float(np.count_nonzero(mask & truth) / union) if union else 1.0


def boundary_match(mask: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F: how well the boundaries of two [H, W] bool masks match; 1 if both are empty.

    Args:
      mask: of an object.
      truth: of the same object.
      tolerance: share of the diagonal; the distance is rounded up to whole pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*mask.shape))
    ours, true = boundary(mask), boundary(truth)
    if not ours.any() or not true.any():
        # One of precision and recall is undefined, and the other is 0.
        return float(ours.any() == true.any())
    precision = np.count_nonzero(ours & dilate(true, radius)) / np.count_nonzero(ours)
    recall = np.count_nonzero(true & dilate(ours, radius)) / np.count_nonzero(true)
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask [H, W] that differ from the one to the right, below, or diagonally below."""
    # The last row and column are repeated beyond the edge.
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = wide[:-1, :-1]
    return (here != wide[:-1, 1:]) | (here != wide[1:, :-1]) | (here != wide[1:, 1:])


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilates a mask [H, W] with a disk of a radius in pixels."""
    height, width = mask.shape
    padded = np.zeros((height + 2 * radius, width + 2 * radius), bool)
    # A boundary has few pixels: stamp a disk around each.
    places = np.flatnonzero(np.pad(mask, radius))
    flat, steps = padded.reshape(-1), np.arange(-radius, radius + 1)
    rows, columns = np.nonzero(steps[:, None] ** 2 + steps**2 <= radius**2)
    for step in (rows - radius) * padded.shape[1] + columns - radius:
        flat[places + step] = True
    return padded[radius : radius + height, radius : radius + width]


def statistics(values: np.ndarray) -> Statistics:
    """Summarises a measure [T] over the frames of a sequence, at least one."""
    # Four parts as in the official evaluation; adjacent parts share a frame.
    ends = np.floor(np.linspace(0, len(values) - 1, 5) + 0.5).astype(int)
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return Statistics(
        float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())
    )
