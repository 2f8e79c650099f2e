"""The host's evaluation transforms give the pixels of Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage, fit, fitted_size, resize_and_crop, squash
from tests.conftest import parity_cases
from tests.support.encoded import encoded

# `decode` silences Pillow's warnings, but pytest turns them into errors again.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


@pytest.mark.parametrize("side", [7, 40, 59, 75, 200])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_fit_is_the_thumbnail_of_the_whole_image(mode: str, side: int, photo: Image.Image) -> None:
    """Also for a JPEG, which Pillow alone would decode at a reduced scale."""
    for format_ in ("PNG", "JPEG") if mode == "RGB" else ("PNG",):
        opened = encoded(photo.convert(mode), format_)
        expected = opened.convert("RGB")
        expected.thumbnail((side, side), Image.Resampling.LANCZOS)
        found = fit(encoded(photo.convert(mode), format_), side)
        np.testing.assert_array_equal(found, np.asarray(expected))
        assert found.shape[:2] == fitted_size(photo.size, side)
    assert fit(encoded(photo.convert(mode), "PNG"), side, channels=1).shape[2] == 1


def test_fitted_size_of_any_image() -> None:
    rng = np.random.default_rng(0)
    for width, height, side in rng.integers(1, 90, (200, 3)).tolist():
        pixels = fit(encoded(Image.new("L", (width, height)), "PNG"), side)
        assert pixels.shape[:2] == fitted_size((width, height), side)
    with pytest.raises(UnreadableImage, match="more than Pillow's limit"):
        fitted_size((10**6, 10**6), 224)


def test_squash_is_pillows_bicubic_resize(photo: Image.Image) -> None:
    expected = photo.resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squash(encoded(photo, "PNG"), 32), np.asarray(expected))
    assert squash(encoded(photo, "PNG"), 32, channels=1).shape == (32, 32, 1)


@pytest.mark.parametrize("path", parity_cases("augment*.npz"), ids=lambda p: p.stem)
def test_resize_and_crop_matches_torchvision(path: Path) -> None:
    golden = np.load(path)
    cases = [key for key in golden if key.startswith("eval_")]
    assert cases
    for case in cases:
        _, resize, crop = case.split("_")
        pixels = resize_and_crop(Image.fromarray(golden["image"]), int(resize), int(crop))
        np.testing.assert_array_equal(pixels, golden[case])


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (50, 50), (333, 100)])
def test_resize_and_crop_geometry(photo: Image.Image, size: tuple[int, int]) -> None:
    image = photo.resize(size)
    short = min(size)
    resized = image.resize(tuple(int(47 * side / short) for side in size), Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2.0) for side in resized.size)
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(resize_and_crop(image, 47, 32), expected)


def test_resize_and_crop_rejects_a_very_thin_image() -> None:
    with pytest.raises(UnreadableImage, match="limit"):
        resize_and_crop(Image.new("RGB", (60_000, 1)), 256, 224)
