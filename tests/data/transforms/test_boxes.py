"""Crop boxes have the distribution of torchvision's RandomResizedCrop."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp

from dino_jax.data.transforms.multicrop import sample_boxes

RATIO = (3 / 4, 4 / 3)
NUMBER = 4000  # boxes in each statistic
draw = jax.jit(sample_boxes, static_argnums=(2, 3))


def boxes(size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    uniform = np.random.default_rng(1).random((NUMBER, 22), np.float32)
    return np.asarray(draw(uniform, jnp.array(size), scale, RATIO))


def boxes_by_loop(size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """RandomResizedCrop as documented, one try after another."""
    source = random.Random(0)
    height, width = size
    found = []
    for _ in range(NUMBER):
        for _ in range(10):
            area = height * width * source.uniform(*scale)
            ratio = math.exp(source.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                found.append((source.randint(0, height - h), source.randint(0, width - w), h, w))
                break
        else:
            h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
            found.append(((height - h) // 2, (width - w) // 2, h, w))
    return np.array(found)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((375, 500), (0.4, 1.0)),
        ((375, 500), (0.05, 0.4)),
        ((64, 20), (0.4, 1.0)),
        ((9, 9), (0.05, 1)),
    ],
)
def test_boxes_have_the_right_distribution(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    """Kolmogorov-Smirnov test against the loop, for sides, positions and their combinations."""
    ours, loops = boxes(size, scale), boxes_by_loop(size, scale)
    for name, value in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "slack below": lambda b: size[0] - b[:, 0] - b[:, 2],
    }.items():
        assert ks_2samp(value(ours), value(loops)).pvalue > 1e-3, name


def test_boxes_are_within_their_bounds() -> None:
    height, width = 375, 500
    top, left, h, w = boxes((height, width), (0.05, 0.4)).T
    assert min(top.min(), left.min()) == 0
    assert (top + h).max() == height
    assert (left + w).max() == width
    assert min(h.min(), w.min()) > 0
    share = h * w / (height * width)
    assert 0.049 < share.min() < 0.055
    assert 0.39 < share.max() < 0.405
    assert 0.74 < (w / h).min() < 0.76
    assert 1.32 < (w / h).max() < 1.35


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 10), (43, 0, 13, 10)),  # height = width / (3/4), in the middle
        ((10, 100), (0, 43, 10, 13)),  # width = height * (4/3)
        ((1, 9), (0, 4, 1, 1)),
    ],
)
def test_central_fallback(size: tuple[int, int], box: tuple[int, ...]) -> None:
    """If no box of the whole area and an allowed ratio fits; as in torchvision."""
    assert np.array_equal(np.unique(boxes(size, (1.0, 1.0)), axis=0), [box])
    assert np.array_equal(np.unique(boxes_by_loop(size, (1.0, 1.0)), axis=0), [box])


def test_one_pixel() -> None:
    assert np.array_equal(np.unique(boxes((1, 1), (0.05, 1.0)), axis=0), [(0, 0, 1, 1)])
