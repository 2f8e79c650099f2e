"""Decodes image files of any mode and size to uint8 pixels, with one error for broken files.

Dims: `h, w` pixels of one image, `C` channels (3 RGB, 1 grey).
"""

import contextlib
import errno
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_jax.errors import UsageError

# Pillow's warnings (damaged EXIF, odd palettes, large images) are harmless, or `UnreadableImage`
# replaces them. The filter is permanent because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")

# The formats that are read, with their file extensions. Pillow knows more, but some of these start
# other programs (EPS starts Ghostscript) or hold no pixels of their own.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "ICO": (".ico",),
    "TGA": (".tga",),  # last, because TGA files have no signature
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

# Pillow raises an error for larger images, and only warns at half of it.
MAX_PIXELS = 2 * 89_478_485

_MODES = {1: "L", 3: "RGB"}  # by number of channels

# What Pillow raises for broken files: the first three for randomly damaged files of every format
# with Pillow 13, the others according to bug reports about earlier versions.
_BROKEN_FILE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)
# Errors of the machine, not of the file: here no other image may replace the unreadable one.
_MACHINE_TROUBLE = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


class UnreadableImage(ValueError):
    """The file does not contain a usable image; the message gives the reason in one line."""


@contextlib.contextmanager
def _unreadable_if_broken() -> Iterator[None]:
    try:
        yield
    except (UnreadableImage, UsageError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not in an image format that Pillow supports") from error
    except _BROKEN_FILE as error:
        if getattr(error, "errno", None) in _MACHINE_TROUBLE:
            raise UsageError(
                f"images cannot be read at present ({error}): check the file system and this "
                "machine's free memory and limit of open files, then run the same command again"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(reason) from error


def open_image(file: str | PathLike | IO[bytes]) -> Image.Image:
    """Opens an image file without decoding its pixels.

    Args:
      file: a path, or a binary file object.

    Returns:
      A Pillow image; `decode` reads and closes it.

    Raises:
      UnreadableImage: the file is missing, not a regular file, or not an image.
      UsageError: the machine cannot read files at present.
    """
    with _unreadable_if_broken():
        if isinstance(file, str | PathLike):
            check_regular(file)
        return Image.open(file, formats=_formats())


def check_regular(path: str | PathLike) -> None:
    """Raises UnreadableImage for a pipe, device, socket or folder: opening it might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImage("not a regular file")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The `FORMATS` that this installation of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_file(path: str | PathLike) -> bytes:
    """The content of an image file, unchecked.

    Raises:
      UnreadableImage: the file does not exist or is not a regular file, or there is no permission
        to read it.
    """
    with _unreadable_if_broken():
        check_regular(path)
        return Path(path).read_bytes()


def to_png(image: Image.Image) -> bytes:
    """Encodes an image, without loss, as the content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decode(image: Image.Image, max_side: int | None = None, channels: int = 3) -> np.ndarray:
    """Decodes an image to 8 bits per channel, as `Image.convert` does, with two exceptions.

    16-bit grey keeps its upper byte instead of being clipped, and 32-bit integer and float images,
    which have no fixed white level, are scaled so that their smallest value becomes 0 and their
    largest 255. Alpha is dropped and the EXIF orientation ignored, as in the reference. Animations
    give their first frame.

    Args:
      image: an opened image; this function closes it.
      max_side: an image with a longer side is shrunk to this many pixels, keeping its aspect ratio
        (antialiased bicubic; a JPEG is first decoded at a reduced scale that is large enough).
      channels: 3 for RGB, 1 for grey.

    Returns:
      [h, w, C] uint8.

    Raises:
      UnreadableImage: the file is broken, or the image is empty or beyond Pillow's size limit.
    """
    with _unreadable_if_broken(), image:
        picture = _to_mode(image, channels, max_side)
    return _pixels(picture)


def resize_and_crop(image: Image.Image, resize: int, crop: int, channels: int = 3) -> np.ndarray:
    """The evaluation transform on the host: resizes the shorter side and crops the centre.

    Sizes and offsets are rounded as in torchvision's `Resize` and `CenterCrop`.

    Args:
      image: an opened image; this function closes it.
      resize: shorter side after resizing (antialiased bicubic), in pixels.
      crop: side of the central square in pixels, at most `resize`.
      channels: 3 for RGB, 1 for grey.

    Returns:
      [crop, crop, C] uint8.

    Raises:
      UnreadableImage: as `decode`, or the image is too long and thin to be resized.
    """
    with _unreadable_if_broken(), image:
        picture = _to_mode(image, channels)
        width, height = (int(resize * side / min(picture.size)) for side in picture.size)
        _check_size((width, height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return _pixels(picture.crop((left, top, left + crop, top + crop)))


def fit(image: Image.Image, side: int, channels: int = 3) -> np.ndarray:
    """Shrinks an image to fit into a square, keeping its aspect ratio.

    Same as `Image.thumbnail` with the Lanczos filter, except that a JPEG is always decoded at full
    scale.

    Args:
      image: an opened image; this function closes it.
      side: side of the square in pixels; a smaller image stays as it is.
      channels: 3 for RGB, 1 for grey.

    Returns:
      [h, w, C] uint8, where (h, w) is `fitted_size`.

    Raises:
      UnreadableImage: as `decode`.
    """
    with _unreadable_if_broken(), image:
        # `thumbnail` decodes a JPEG at a reduced scale, but a copy has no file format.
        picture = _to_mode(image, channels).copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _pixels(picture)


@functools.cache
def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) after `fit` of an image of (width, height); raises the same errors."""
    _check_size(size)
    blank = Image.new("L", size)  # lets Pillow itself do the rounding
    blank.thumbnail((side, side), Image.Resampling.NEAREST)
    return blank.height, blank.width


def squash(image: Image.Image, side: int, channels: int = 3) -> np.ndarray:
    """Resizes an image of any shape to a square (antialiased bicubic).

    Args:
      image: an opened image; this function closes it.
      side: side of the square in pixels.
      channels: 3 for RGB, 1 for grey.

    Returns:
      [side, side, C] uint8.

    Raises:
      UnreadableImage: as `decode`.
    """
    with _unreadable_if_broken(), image:
        picture = _to_mode(image, channels).resize((side, side), Image.Resampling.BICUBIC)
    return _pixels(picture)


def _check_size(size: tuple[int, int]) -> None:
    """Rejects empty images, and those too large for the memory, before decoding any pixel."""
    width, height = size
    if width < 1 or height < 1:
        raise UnreadableImage(f"the image is empty: {width}x{height} pixels")
    limit = Image.MAX_IMAGE_PIXELS  # None if the user has removed it
    if limit is not None and width * height > 2 * limit:
        raise UnreadableImage(
            f"{width}x{height} is {width * height} pixels, more than Pillow's limit of {2 * limit}"
        )


def _pixels(picture: Image.Image) -> np.ndarray:
    """The pixels [h, w, C] uint8 of a grey or RGB image."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _to_mode(image: Image.Image, channels: int, max_side: int | None = None) -> Image.Image:
    """Loads the pixels as grey or RGB, shrunk if a side is longer than `max_side`."""
    _check_size(image.size)
    size, box = image.size, None
    if max_side is not None and max(size) > max_side:
        size = tuple(max(1, round(side * max_side / max(image.size))) for side in image.size)
        if draft := image.draft(None, size):
            _, box = draft  # the exact box: the reduced size itself is rounded up
    image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretch(np.asarray(image, np.float64)))
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, box)


def _stretch(values: np.ndarray) -> np.ndarray:
    """Maps the smallest finite value to 0 and the largest to 255: [h, w] float -> uint8."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise UnreadableImage("the image has no finite pixel")
    low, high = finite.min(), finite.max()
    values = np.clip(np.nan_to_num(values, nan=low), low, high)
    return np.round((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
