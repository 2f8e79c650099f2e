"""A short video of a moving square, and the tolerance for lossy coding."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (48, 64, 3)


def frames(count: int = 6) -> Iterator[np.ndarray]:
    """The frames of a square that moves to the right."""
    for i in range(count):
        frame = np.full(SHAPE, (30, 60, 90), np.uint8)
        frame[16:32, 8 * i : 8 * i + 16] = (220, 200, 40)
        yield frame


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def assert_alike(ours: np.ndarray, expected: np.ndarray) -> None:
    """Asserts equal frames, except for coding and chroma subsampling at the square's edges."""
    assert np.abs(ours.astype(int) - expected).mean() < 6
