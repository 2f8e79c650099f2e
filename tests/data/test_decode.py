"""Images of all formats and modes are decoded to the pixels that Pillow gives."""

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode
from tests.support.encoded import encoded

# `decode` silences Pillow's warnings, but pytest turns them into errors again.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


@pytest.mark.parametrize(
    ("format_", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "1", "P")),
        *(("TIFF", mode) for mode in ("RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("BMP", mode) for mode in ("RGB", "L", "1", "P")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_pillows_conversion(
    photo: Image.Image, format_: str, mode: str, channels: int
) -> None:
    image = encoded(photo.convert(mode), format_)
    target = "L" if channels == 1 else "RGB"
    expected = np.asarray(image.copy().convert(target)).reshape(60, 90, channels)
    pixels = decode(image, channels=channels)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_palette_with_transparency(photo: Image.Image) -> None:
    palette = photo.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    image = encoded(palette, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode(image), expected)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format_: str) -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decode(encoded(Image.fromarray(ramp), format_))
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_big_endian_sixteen_bits() -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(image, channels=1)[..., 0], ramp >> 8)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e5, 7e5), (0.0, 255.0), (5.0, 5.0)])
def test_float_is_stretched(low: float, high: float) -> None:
    values = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), channels=1)[..., 0]
    expected = np.arange(256).reshape(16, 16) if high > low else 0
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_float_with_holes() -> None:
    values = np.array([[0.0, 1.0, np.nan], [np.inf, -np.inf, 0.5]], np.float32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), channels=1)[..., 0]
    np.testing.assert_array_equal(pixels, [[0, 255, 0], [255, 0, 128]])
    with pytest.raises(UnreadableImage, match="no finite pixel"):
        decode(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_integers_of_32_bits_are_stretched() -> None:
    values = np.array([[0, 1000], [100_000, 200_000]], np.int32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), channels=1)[..., 0]
    np.testing.assert_array_equal(pixels, [[0, 1], [128, 255]])


def test_exif_orientation_is_ignored(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(encoded(photo, "JPEG", exif=exif)).shape == (60, 90, 3)


@pytest.mark.parametrize("format_", ["TIFF", "WEBP", "PNG"])
def test_first_frame(photo: Image.Image, format_: str) -> None:
    other = Image.new("RGB", photo.size)
    options = {"lossless": True} if format_ == "WEBP" else {}
    image = encoded(photo, format_, save_all=True, append_images=[other], **options)
    np.testing.assert_array_equal(decode(image), np.asarray(photo))


def test_shrinks_to_fit_and_keeps_the_aspect_ratio(photo: Image.Image) -> None:
    assert decode(encoded(photo, "PNG"), max_side=90).shape == (60, 90, 3)
    pixels = decode(encoded(photo, "PNG"), max_side=45)
    expected = np.asarray(photo.resize((45, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels, expected)
    assert decode(encoded(photo.resize((3, 400)), "PNG"), max_side=40).shape == (40, 1, 3)


@pytest.mark.parametrize("size", [(1003, 701), (640, 1280), (257, 255)])
@pytest.mark.parametrize("max_side", [64, 200, 250])
def test_jpeg_at_reduced_scale(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], max_side: int
) -> None:
    large = photo.resize(size, Image.Resampling.BICUBIC)
    image = encoded(large, "JPEG", quality=95)
    loaded = []
    load = type(image).load
    monkeypatch.setattr(type(image), "load", lambda self: loaded.append(self.size) or load(self))
    pixels = decode(image, max_side=max_side)

    target = tuple(round(side * max_side / max(size)) for side in size)
    assert pixels.shape == (target[1], target[0], 3)
    assert all(read >= wanted for read, wanted in zip(loaded[0], target, strict=True))
    assert (loaded[0] < size) == (max(size) >= 2 * max_side)  # reduced if possible
    exact = np.asarray(large.resize(target, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - exact).mean() < 1.5  # JPEG's own error is 0.5
