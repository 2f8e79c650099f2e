"""Every broken or absurd file becomes one error."""

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

from dino_jax.data.decode import UnreadableImage, decode, open_image
from dino_jax.errors import UsageError

# pytest turns warnings into errors again after `decode` has silenced Pillow's.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


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
        (lambda _: b"", "not in an image format"),
        (lambda _: b"<!DOCTYPE html><title>404</title>", "not in an image format"),
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
        (OSError(errno.EMFILE, "Too many open files"), UsageError, r"cannot be read at .*Too m"),
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
