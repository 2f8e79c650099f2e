"""Which pictures a job draws, and how they become the network's input.

Dims: `h, w` pixels of a picture as it is, `H, W` of the network's input, `C` channels.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from dino_jax import sharding
from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.data.sources.files import Files
from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError
from dino_jax.memory import device_limit, gib, machine_memory

SIZE = (480, 480)  # height and width in pixels, as in the reference


def open_pictures(names: Sequence[str]) -> list[Source]:
    """Opens image files, folders and other sources, in the order given.

    Raises:
      UsageError: one of them does not exist or is none of these.
    """
    if not names:
        raise UsageError("no image was given: name files, folders or other sources")
    for name in names:
        if Path(name).suffix and ":" not in name and not Path(name).exists():
            raise UsageError(f"there is no image {name}: check the path")
    sources: list[Source] = []
    for is_file, group in itertools.groupby(names, key=lambda name: Path(name).is_file()):
        if is_file:
            paths = [Path(name) for name in group]
            sources.append(Files(", ".join(map(str, paths)), paths))
        else:
            sources.extend(map(open_source, group))
    return sources


class Pictures:
    """The readable pictures of some sources, each with a name that is unique among them.

    Iterating gives (name, [h, w, C] uint8); `unreadable` names those that were left out so far,
    each of which is logged.
    """

    def __init__(self, sources: Sequence[Source], *, channels: int) -> None:
        # However many are unreadable, the others are drawn.
        self._records = [Records(x, max_unreadable=1.0, channels=channels) for x in sources]

    def __len__(self) -> int:
        return sum(map(len, self._records))

    @property
    def unreadable(self) -> list[str]:
        return [x.source.name(i) for x in self._records for i in sorted(x.unreadable)]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        taken: set[str] = set()
        for records in self._records:
            for index in range(len(records)):
                pixels = records.read(
                    index, lambda image, n=records.channels: decode(image, None, n)
                )
                if pixels is not None:
                    name = records.source.name(index).removeprefix(f"{records.source.spec} ")
                    yield _unique(name, taken), pixels
        if not taken:
            specs = ", ".join(records.source.spec for records in self._records)
            raise UsageError(f"no image of {specs} can be read; the warnings above say why")


def _unique(name: str, taken: set[str]) -> str:
    """A file's name for a picture, without folder and ending; counted up where it is taken."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem) or "picture"
    candidates = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    unique = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(unique)
    return unique


def check_size(size: Sequence[int], patch_size: int) -> None:
    """Raises UsageError for a size that `fit` cannot make."""
    if len(size) not in (1, 2) or (tuple(size) != (0,) and min(size) < patch_size):
        raise UsageError(
            f"size={' '.join(map(str, size))}: give height and width, or the shorter side alone, "
            f"of at least {patch_size} pixels (a patch); 0 leaves images as they are"
        )


def check_memory(image: np.ndarray, model: nnx.Module) -> None:
    """Raises UsageError for an input [H, W, C] whose attention alone takes more than all memory.

    A ViT's grows with the square of the number of patches, an XCiT's does not.
    """
    if model.family != "vit":
        return
    height, width = image.shape[:2]
    tokens = 1 + height // model.patch_size * (width // model.patch_size)
    need = 4 * model.num_heads * tokens**2
    limit = device_limit(sharding.make_mesh(jax.local_devices()[:1])) or machine_memory()
    if need > limit:
        raise UsageError(
            f"{width}x{height} pixels are {tokens} tokens, whose attention to each other takes "
            f"{gib(need)} of memory, and there are {gib(limit)}: give a smaller --size, such as "
            f"--size {min(SIZE)} for the shorter side"
        )


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises UsageError where `what`, which a network has computed, is not finite everywhere."""
    if not np.isfinite(values).all():
        raise UsageError(
            f"{what} hold a value that is not finite: the weights are broken, give others"
        )


def fit(
    pixels: np.ndarray,
    size: Sequence[int],
    patch_size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Resizes a picture, antialiased, and cuts the right and bottom to whole patches.

    Args:
      pixels: [h, w, C] uint8.
      size: as `resized_shape` takes it.
      patch_size: pixels.
      resample: NEAREST for masks.
    Returns: [H, W, C] uint8, both sides multiples of the patch, of which there is at least one.
    """
    height, width = resized_shape(pixels.shape[:2], size, patch_size)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized = np.asarray(picture.resize((width, height), resample)).reshape(height, width, -1)
    return resized[: height - height % patch_size, : width - width % patch_size]


def resized_shape(shape: tuple[int, int], size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Height and width that a picture is resized to, at least a patch.

    Args:
      shape: its height and width.
      size: (height, width); (shorter side,), which keeps the shape; or (0,), as it is.
      patch_size: pixels.
    """
    if len(size) == 2:
        shape = tuple(size)
    elif size[0]:
        shape = tuple(round(size[0] * side / min(shape)) for side in shape)
    return max(shape[0], patch_size), max(shape[1], patch_size)
