"""The pictures that a job draws: sources, file names and the size of the network's input.

Dims: `h, w` pixels of a picture, `H, W` of the network's input, `C` channels.
"""

import itertools
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source, open_source
from dino_jax.data.sources.files import Files
from dino_jax.errors import UsageError
from dino_jax.text import cut

SIZE = (480, 480)  # height and width in pixels, as in the reference


class PictureList:
    """Several sources as one, without labels; implements `Source`."""

    class_names, labels = None, None

    def __init__(self, sources: Sequence[Source]) -> None:
        self.spec = ", ".join(source.spec for source in sources)
        # The folders that were searched for images.
        self.folders = tuple(f for source in sources for f in getattr(source, "folders", ()))
        self._places = [(source, i) for source in sources for i in range(len(source))]

    def __len__(self) -> int:
        return len(self._places)

    def image(self, index: int) -> Image.Image:
        source, i = self._places[index]
        return source.image(i)

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        source, i = self._places[index]
        return source.name(i)

    def stamp(self, index: int) -> str:
        source, i = self._places[index]
        return source.stamp(i)

    def stems(self) -> list[str]:
        """A unique file stem for each picture; repeated ones get a number: photo, photo_2."""
        taken: dict[str, None] = {}
        for source, i in self._places:
            stem = file_stem(source, i)
            candidates = itertools.chain([stem], (f"{stem}_{n}" for n in itertools.count(2)))
            taken[next(candidate for candidate in candidates if candidate not in taken)] = None
        return list(taken)


def open_pictures(names: Sequence[str]) -> PictureList:
    """Opens image files, folders and other sources, in the given order.

    Raises:
      UsageError: one of them does not exist or cannot be opened.
    """
    if not names:
        raise UsageError("no images given: name files, folders or other sources")
    names = [os.path.expanduser(name) for name in names]
    for name in names:
        if Path(name).suffix and ":" not in name and not Path(name).exists():
            raise UsageError(f"image file {name} does not exist: check the path")
    sources: list[Source] = []
    for is_file, group in itertools.groupby(names, key=lambda name: Path(name).is_file()):
        if is_file:
            paths = [Path(name) for name in group]
            sources.append(Files(", ".join(map(str, paths)), paths))
        else:
            sources.extend(map(open_source, group))
    return PictureList(sources)


def file_stem(source: Source, index: int) -> str:
    """The name of a picture as a file stem: without folder, extension and unusual characters."""
    name = source.name(index).removeprefix(f"{source.spec} ")
    return cut(re.sub(r"[^\w.-]+", "_", Path(name).stem)) or "picture"


def read_pixels(records: Records, index: int) -> np.ndarray | None:
    """Decodes a picture at its full size: [h, w, C] uint8, or None if it is unreadable."""
    return records.read(index, partial(decode, channels=records.channels))


def check_input_size(size: Sequence[int], patch_size: int) -> None:
    """Raises UsageError for a size that `fit_to_patches` cannot produce."""
    if len(size) not in (1, 2) or (tuple(size) != (0,) and min(size) < patch_size):
        raise UsageError(
            f"size={' '.join(map(str, size))}: give height and width, or the shorter side alone, "
            f"of at least {patch_size} pixels (one patch); 0 keeps the size of the images"
        )


def fit_to_patches(
    pixels: np.ndarray,
    size: Sequence[int],
    patch_size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Resizes a picture, antialiased, and crops right and bottom to whole patches.

    Args:
      pixels: [h, w, C] uint8.
      size: as in `resized_shape`.
      patch_size: pixels.
      resample: NEAREST for masks.
    Returns: [H, W, C] uint8; both sides are multiples of the patch size, at least one patch.
    """
    height, width = resized_shape(pixels.shape[:2], size, patch_size)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized = np.asarray(picture.resize((width, height), resample)).reshape(height, width, -1)
    return resized[: height - height % patch_size, : width - width % patch_size]


def resized_shape(shape: tuple[int, int], size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Height and width that a picture is resized to, at least one patch.

    Args:
      shape: height and width of the picture.
      size: (height, width); (shorter side,), which keeps the aspect ratio; or (0,), which keeps
        the size.
      patch_size: pixels.
    """
    if len(size) == 2:
        shape = tuple(size)
    elif size[0]:
        shape = tuple(round(size[0] * side / min(shape)) for side in shape)
    return max(shape[0], patch_size), max(shape[1], patch_size)


def patch_grid_shape(
    shape: tuple[int, int], size: Sequence[int], patch_size: int
) -> tuple[int, int]:
    """Height and width (H, W) that `fit_to_patches` gives; arguments as in `resized_shape`."""
    height, width = resized_shape(shape, size, patch_size)
    return height - height % patch_size, width - width % patch_size
