"""Every broken or oversized file raises the same error."""

import errno
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode, open_image
from dino_jax.errors import UsageError
from tests.support.scripts import run_script

# `decode` silences Pillow's warnings, but pytest turns them into errors again.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


def png_of(width: int, height: int) -> bytes:
    """A small PNG file of a huge image, with one bit per pixel."""

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
        (lambda _: png_of(14_000, 14_000), "limit of 178956970"),
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


def test_randomly_damaged_files_raise_nothing_else(photo: Image.Image) -> None:
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
            places = (len(content) * rng.random(4) ** 3).astype(int)  # mostly in the header
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
def test_errors_of_the_machine_are_not_blamed_on_the_file(
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    becomes: type[BaseException],
    message: str | None,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(becomes, match=message):
        open_image(io.BytesIO())


def test_nothing_is_printed(tmp_path: Path, photo: Image.Image) -> None:
    """Neither for a huge image nor for a palette that Pillow warns about."""
    (tmp_path / "huge.png").write_bytes(png_of(14_000, 14_000))
    photo.quantize(16).save(tmp_path / "odd.png", transparency=bytes(range(16)))
    script = f"""
from dino_jax.data.decode import UnreadableImage, decode, open_image
decode(open_image(r"{tmp_path}/odd.png"))
try:
    decode(open_image(r"{tmp_path}/huge.png"))
except UnreadableImage:
    print("rejected")
"""
    assert run_script(script, "-W", "always") == (0, "rejected\n", "")
