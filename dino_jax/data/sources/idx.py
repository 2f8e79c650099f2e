"""`idx:/path@train`: the four files of MNIST, or of another dataset in the same format.

Format (http://yann.lecun.com/exdb/mnist/, archived): a big-endian magic number, one 32-bit length
per axis, then the bytes.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import to_png
from dino_jax.errors import UsageError
from dino_jax.paths import local_path

_PREFIX = {"train": "train", "test": "t10k"}  # split: prefix of its file names


class IdxSource:
    """Grey images, kept in memory as one array."""

    class_names = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, spec: str) -> None:
        self.spec = spec
        self.labels = labels.astype(np.int32)
        self._images = images  # [len, h, w] uint8

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def encoded(self, index: int) -> bytes:
        return to_png(self.image(index))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.spec} image {index}"

    def stamp(self, index: int) -> str:
        return f"{zlib.crc32(self._images[index])} {self.label(index)}"


def open_idx(location: str, split: str | None) -> IdxSource:
    """Opens `idx:location@split`; see `open_source`."""
    spec = f"idx:{location}" + (f"@{split}" if split else "")
    if split not in _PREFIX:
        raise UsageError(f"source {spec!r}: an idx source needs the split @train or @test")
    root = local_path(location, "source")
    if not root.is_dir():
        raise UsageError(f"source {spec!r}: {root} is not a folder; check the path")
    images = _read_idx(root, f"{_PREFIX[split]}-images-idx3-ubyte", dims=3)
    labels = _read_idx(root, f"{_PREFIX[split]}-labels-idx1-ubyte", dims=1)
    if images.size == 0 or len(images) != len(labels):
        raise UsageError(
            f"source {spec!r}: {len(images)} images of {images.shape[1]}x{images.shape[2]} pixels "
            f"but {len(labels)} labels; download the files again"
        )
    return IdxSource(images, labels, spec)


def _read_idx(root: Path, name: str, dims: int) -> np.ndarray:
    """Reads the uint8 array with `dims` axes in `root/name` or `root/name.gz`."""
    path = root / name
    if not path.exists():
        path = root / f"{name}.gz"
    if not path.exists():
        raise UsageError(f"{root} has neither {name} nor {name}.gz; put the four files there")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}; download it again") from error
    header = 4 * (1 + dims)
    magic = bytes((0, 0, 8, dims))  # 8: unsigned bytes
    if content[:4] != magic or len(content) < header:
        raise UsageError(
            f"{path} is not an idx file of bytes with {dims} axes: it starts with "
            f"{content[:4].hex()} instead of {magic.hex()}; download it again"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dims, 4))
    if len(content) - header != math.prod(shape):
        raise UsageError(
            f"{path} has {len(content) - header} bytes of data, but its header gives {shape} = "
            f"{math.prod(shape)} bytes; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
