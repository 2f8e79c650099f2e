"""Every kind of image becomes the same uint8 pixels; every broken one becomes one error."""

import errno
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import parity_cases
from dino_jax.data.decode import (
    UnreadableImage,
    decode,
    fit,
    fitted_size,
    open_image,
    resize_and_crop,
    squash,
)
from dino_jax.errors import UsageError

# pytest turns warnings into errors again after `decode` has silenced Pillow's.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth picture, 90 wide and 60 high, with all colours."""
    rows, columns = np.mgrid[:60, :90] / 60
    waves = [np.sin(4 * rows + k) * np.cos(3 * columns - k) for k in range(3)]
    return Image.fromarray(np.uint8(np.round(127.5 + 127 * np.stack(waves, -1))))


def encoded(image: Image.Image, format_: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return open_image(file)


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
def test_is_what_pillow_converts_to(
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
    with pytest.raises(UnreadableImage, match="no pixel"):
        decode(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_integers_of_32_bits_are_stretched() -> None:
    values = np.array([[0, 1000], [100_000, 200_000]], np.int32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), channels=1)[..., 0]
    np.testing.assert_array_equal(pixels, [[0, 1], [128, 255]])


def test_exif_orientation_is_ignored(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(photo, "JPEG", exif=exif)).shape == (60, 90, 3)


@pytest.mark.parametrize("format_", ["TIFF", "WEBP", "PNG"])
def test_first_frame(photo: Image.Image, format_: str) -> None:
    other = Image.new("RGB", photo.size)
    options = {"lossless": True} if format_ == "WEBP" else {}
    image = encoded(photo, format_, save_all=True, append_images=[other], **options)
    np.testing.assert_array_equal(decode(image), np.asarray(photo))


def test_shrinks_to_fit_and_keeps_the_shape(photo: Image.Image) -> None:
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
    assert (loaded[0] < size) == (max(size) >= 2 * max_side)  # reduced where it can be
    exact = np.asarray(large.resize(target, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - exact).mean() < 1.5  # JPEG's own error is 0.5


# --- the evaluation transform ---


@pytest.mark.parametrize("side", [7, 40, 59, 75, 200])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_fit_is_the_thumbnail_of_the_whole_picture(
    mode: str, side: int, photo: Image.Image
) -> None:
    """Also of a JPEG, which Pillow would by itself decode at a reduced scale."""
    for format_ in ("PNG", "JPEG") if mode == "RGB" else ("PNG",):
        opened = encoded(photo.convert(mode), format_)
        expected = opened.convert("RGB")
        expected.thumbnail((side, side), Image.Resampling.LANCZOS)
        found = fit(encoded(photo.convert(mode), format_), side)
        np.testing.assert_array_equal(found, np.asarray(expected))
        assert found.shape[:2] == fitted_size(photo.size, side)
    assert fit(encoded(photo.convert(mode), "PNG"), side, channels=1).shape[2] == 1


def test_fitted_size_of_any_picture() -> None:
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


def test_resize_and_crop_refuses_a_thread_of_an_image() -> None:
    with pytest.raises(UnreadableImage, match="limit"):
        resize_and_crop(Image.new("RGB", (60_000, 1)), 256, 224)


# --- broken and absurd files ---


def png_of(width: int, height: int) -> bytes:
    """A small PNG, of one bit per pixel, that unfolds to a huge picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncated(format_: str) -> Callable[[Image.Image], bytes]:
    def make(photo: Image.Image) -> bytes:
        file = io.BytesIO()
        photo.save(file, format_)
        return file.getvalue()[: len(file.getvalue()) // 2]

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (truncated("JPEG"), "truncated"),
        (truncated("PNG"), "truncated"),
        (truncated("TIFF"), "."),
        (truncated("WEBP"), "."),
        (truncated("BMP"), "truncated"),
        (lambda _: b"", "no image format"),
        (lambda _: b"<!DOCTYPE html><title>404</title>", "no image format"),
        (lambda _: png_of(12_000, 12_000), "limit of 89478485"),
        (lambda _: png_of(20_000, 20_000), "limit of 178956970"),
        (lambda _: png_of(0, 5), "."),
    ],
)
@pytest.mark.parametrize("from_disk", [True, False])
def test_broken_file(
    tmp_path: Path,
    photo: Image.Image,
    make: Callable[[Image.Image], bytes],
    reason: str,
    from_disk: bool,
) -> None:
    content = make(photo)
    assert len(content) < 500_000
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(open_image(path if from_disk else io.BytesIO(content)))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        open_image(tmp_path / "gone.png")


def test_mutated_files_raise_nothing_else(photo: Image.Image) -> None:
    rng = np.random.default_rng(0)
    small = photo.resize((30, 20))
    kinds = [(small, "PNG"), (small, "JPEG"), (small, "WEBP"), (small, "BMP"), (small, "TIFF")]
    kinds += [(small.quantize(8), "PNG"), (small.convert("CMYK"), "JPEG")]
    outcomes = set()
    for image, format_ in kinds:
        file = io.BytesIO()
        image.save(file, format_)
        for _ in range(150):
            content = np.frombuffer(file.getvalue(), np.uint8).copy()
            places = (len(content) * rng.random(4) ** 3).astype(int)  # most in the header
            content[places] = rng.integers(0, 256, 4)
            try:
                outcomes.add(decode(open_image(io.BytesIO(content.tobytes())), 16).shape[2])
            except UnreadableImage:
                outcomes.add("unreadable")
    assert outcomes == {3, "unreadable"}


@pytest.mark.parametrize(
    ("error", "becomes", "message"),
    [
        (MemoryError(), MemoryError, None),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.EMFILE, "Too many open files"), UsageError, r"cannot be read now .*Too m"),
        (OSError(errno.EIO, "Input/output error"), UsageError, r"run the same command again$"),
    ],
    ids=str,
)
def test_the_machines_trouble_is_not_the_files(
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    becomes: type[BaseException],
    message: str | None,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(becomes, match=message):
        open_image("picture.jpg")


def test_nothing_is_printed(tmp_path: Path, photo: Image.Image) -> None:
    """Neither for a huge picture nor for a palette that Pillow finds odd."""
    (tmp_path / "huge.png").write_bytes(png_of(12_000, 12_000))
    photo.quantize(16).save(tmp_path / "odd.png", transparency=bytes(range(16)))
    script = f"""
from dino_jax.data.decode import UnreadableImage, decode, open_image
decode(open_image(r"{tmp_path}/odd.png"))
try:
    decode(open_image(r"{tmp_path}/huge.png"))
except UnreadableImage:
    print("refused")
"""
    command = [sys.executable, "-W", "always", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("refused\n", "")
