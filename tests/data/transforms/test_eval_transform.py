"""The device's evaluation transform gives PIL's pixels."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.data.transforms.eval_transform import eval_transform
from dino_jax.errors import UsageError
from tests.conftest import parity_cases
from tests.support import pil_augment

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # keeps grey levels


@pytest.fixture(scope="module")
def transform() -> Callable[..., jax.Array]:
    static = ("resize", "crop", "mean", "std")
    return jax.jit(eval_transform, static_argnames=static)


def canvas_of(images: list[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
    canvas = np.zeros((len(images), side, side, images[0].shape[-1]), np.uint8)
    for image, place in zip(images, canvas, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return canvas, np.array([image.shape[:2] for image in images], np.int32)


def by_pil(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """torchvision's Resize and CenterCrop."""
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = int(resize * height / short), int(resize * width / short)
    resized = pil_augment.resize(Image.fromarray(image), (new_width, new_height))
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


def apart(ours: jax.Array, theirs: np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(ours) - theirs.astype(np.float32))


@pytest.mark.parametrize("path", parity_cases("augment*.npz"), ids=lambda p: p.stem)
def test_golden(path: Path, transform: Callable[..., jax.Array]) -> None:
    """Measured: a difference of 1 level in 3 of 1e4 values, which are ties of the resampling."""
    recorded = np.load(path)
    image = recorded["image"]
    canvas, size = canvas_of([image], max(image.shape))
    ours = transform(canvas, size, np.array([False]), resize=96, crop=80, **RAW)[0]
    difference = apart(ours, recorded["eval_96_80"])
    assert difference.max() < 1.01
    assert difference.mean() < 1e-2


@pytest.mark.parametrize(("resize", "crop"), [(36, 32), (32, 32), (47, 31)])
def test_against_pil(
    goldens: Path, transform: Callable[..., jax.Array], resize: int, crop: int
) -> None:
    """Landscape, portrait, square, odd margins, smaller than the target, a strip of one pixel.

    Measured: a difference of 1 level in 1 of 1e4 values.
    """
    photo = np.load(goldens / "augment.npz")["image"]
    shapes = [(60, 80), (80, 60), (80, 80), (61, 80), (80, 63), (20, 30), (9, 7), (1, 5), (80, 3)]
    images = [photo[5 * i : 5 * i + h, 7 * i : 7 * i + w] for i, (h, w) in enumerate(shapes)]
    canvas, size = canvas_of(images, 80)
    done = np.zeros(len(images), bool)
    ours = transform(canvas, size, done, resize=resize, crop=crop, **RAW)
    difference = np.array(
        [apart(a, by_pil(b, resize, crop)) for a, b in zip(ours, images, strict=True)]
    )
    assert difference.max() < 1.01
    assert difference.mean() < 2e-3


def test_finished_crops_stay_as_they_are(transform: Callable[..., jax.Array]) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
    canvas, size = canvas_of(images, 40)
    ours = transform(canvas, size, np.array([True, False]), resize=36, crop=32, **RAW)
    assert apart(ours[0], images[0]).max() < 1e-3
    assert apart(ours[1], images[1]).max() > 10


def test_normalised_single_channel(transform: Callable[..., jax.Array]) -> None:
    canvas, size = canvas_of([np.full((28, 28, 1), 51, np.uint8)], 28)
    ours = transform(canvas, size, np.array([False]), resize=32, crop=32, mean=(0.5,), std=(0.25,))
    assert ours.shape == (1, 32, 32, 1)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, (0.2 - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize("crop", [0, 257])
def test_crop_must_fit(crop: int) -> None:
    canvas, size = canvas_of([np.zeros((8, 8, 3), np.uint8)], 8)
    with pytest.raises(UsageError, match=f"crop={crop} must be between 1 and resize=256"):
        eval_transform(canvas, size, np.array([False]), resize=256, crop=crop, **RAW)
