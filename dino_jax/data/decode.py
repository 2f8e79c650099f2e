"""From an opened image file to uint8 pixels: any mode, any size, and one error for what is broken.

Dims: `h, w` pixels of one picture, `C` channels (3 RGB, 1 grey), `S` side of the canvas.
"""

import contextlib
import errno
import functools
import io
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

# What Pillow complains about (damaged EXIF, odd palettes, large pictures) is either harmless or
# said by `UnreadableImage`. One filter for good, since `catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")

_MODES = {1: "L", 3: "RGB"}  # by number of channels

# What Pillow's readers raise on broken files: the first three in mutated files of every format
# with Pillow 13, the others in reports on earlier ones.
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
# The machine's trouble, not the file's: another picture would not help, and must not stand in.
_MACHINE_TROUBLE = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


class UnreadableImage(ValueError):
    """A file that holds no usable picture; the message is the reason, in one line."""


@contextlib.contextmanager
def _unreadable_if_broken() -> Iterator[None]:
    try:
        yield
    except (UnreadableImage, UsageError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("the content is in no image format that Pillow knows") from error
    except _BROKEN_FILE as error:
        if getattr(error, "errno", None) in _MACHINE_TROUBLE:
            raise UsageError(
                f"pictures cannot be read now ({error}): see to the file system, or to this "
                "machine's memory and limit of open files, and run the same command again"
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
      UnreadableImage: the file is missing or is no image.
      UsageError: the machine cannot read files now.
    """
    with _unreadable_if_broken():
        return Image.open(file)


def read_file(path: str | PathLike) -> bytes:
    """The bytes of an image file, whatever they are.

    Raises:
      UnreadableImage: there is no such file, or no right to read it.
    """
    with _unreadable_if_broken():
        return Path(path).read_bytes()


def to_png(image: Image.Image) -> bytes:
    """A file of the same pixels."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decode(image: Image.Image, max_side: int | None = None, channels: int = 3) -> np.ndarray:
    """Decodes an image to 8 bits per channel, as `Image.convert` does where that is sensible.

    16-bit grey keeps its upper byte instead of being clipped; 32-bit integer and float pictures,
    which have no fixed white, are stretched from their smallest to their largest value. Alpha is
    dropped and the EXIF orientation ignored, as in the reference. Animations give one frame, the
    first.

    Args:
      image: an opened image, which is closed.
      max_side: a picture whose longer side is larger is shrunk to it, keeping its shape
        (antialiased bicubic; JPEG at a reduced scale first, never below the size wanted).
      channels: 3 for RGB, 1 for grey.

    Returns:
      [h, w, C] uint8.

    Raises:
      UnreadableImage: the file is broken, or the picture empty or absurdly large.
    """
    with _unreadable_if_broken(), image:
        picture = _to_mode(image, channels, max_side)
    return _pixels(picture)


def resize_and_crop(image: Image.Image, resize: int, crop: int, channels: int = 3) -> np.ndarray:
    """The evaluation transform on the host: shorter side to `resize`, then the centre.

    Sizes and offsets are rounded as torchvision's `Resize` and `CenterCrop` round them.

    Args:
      image: an opened image, which is closed.
      resize: pixels of the shorter side, bicubic with antialiasing.
      crop: side of the square kept, at most `resize`.
      channels: 3 for RGB, 1 for grey.

    Returns:
      [crop, crop, C] uint8.

    Raises:
      UnreadableImage: as `decode`, or so long and thin that it cannot be resized.
    """
    with _unreadable_if_broken(), image:
        picture = _to_mode(image, channels)
        width, height = (int(resize * side / min(picture.size)) for side in picture.size)
        _check_size((width, height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return _pixels(picture.crop((left, top, left + crop, top + crop)))


def fit(image: Image.Image, side: int, channels: int = 3) -> np.ndarray:
    """Shrinks a picture so that it fits into a square, keeping its shape.

    As `Image.thumbnail` with the Lanczos filter does it to the whole picture, without a JPEG's
    reduced scales.

    Args:
      image: an opened image, which is closed.
      side: of the square in pixels; a smaller picture stays as it is.
      channels: 3 for RGB, 1 for grey.

    Returns:
      [h, w, C] uint8, of `fitted_size`.

    Raises:
      UnreadableImage: as `decode`.
    """
    with _unreadable_if_broken(), image:
        # A copy is of no file format, so `thumbnail` has no draft of it.
        picture = _to_mode(image, channels).copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _pixels(picture)


@functools.cache
def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) that `fit` gives a picture of (width, height); errors likewise."""
    _check_size(size)
    blank = Image.new("L", size)  # Pillow's own rounding, by doing it
    blank.thumbnail((side, side), Image.Resampling.NEAREST)
    return blank.height, blank.width


def squash(image: Image.Image, side: int, channels: int = 3) -> np.ndarray:
    """Resizes a picture to a square whatever its shape, bicubic with antialiasing.

    Args:
      image: an opened image, which is closed.
      side: of the square in pixels.
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
    """Refuses what would take the memory of a whole batch, before any pixel is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise UnreadableImage(f"the picture is empty: {width}x{height} pixels")
    limit = Image.MAX_IMAGE_PIXELS  # None where the user has lifted it
    if limit is not None and width * height > limit:
        raise UnreadableImage(
            f"{width}x{height} is {width * height} pixels, more than Pillow's limit of {limit}"
        )


def _pixels(picture: Image.Image) -> np.ndarray:
    """The pixels [h, w, C] uint8 of a grey or RGB picture."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _to_mode(image: Image.Image, channels: int, max_side: int | None = None) -> Image.Image:
    """Loads the pixels, in grey or RGB, shrunk to `max_side` where that is smaller."""
    _check_size(image.size)
    size, box = image.size, None
    if max_side is not None and max(size) > max_side:
        size = tuple(max(1, round(side * max_side / max(image.size))) for side in image.size)
        if draft := image.draft(None, size):
            _, box = draft  # exact, where the reduced size is rounded up
    image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretch(np.asarray(image, np.float64)))
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, box)


def _stretch(values: np.ndarray) -> np.ndarray:
    """Smallest finite value to 0, largest to 255; [h, w] float to uint8."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise UnreadableImage("no pixel of the picture is a number")
    low, high = finite.min(), finite.max()
    values = np.clip(np.nan_to_num(values, nan=low), low, high)
    return np.round((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
