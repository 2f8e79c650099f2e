"""`shapes:N[@SPLIT]`: generated images of a shape on a background.

The class is the shape. Colours, textures, position, size and rotation vary in the same way in all
classes, so the outline predicts the class better than the pixel values do. `mask` marks the pixels
of the shape.
"""

import cmath
import math
import zlib

import numpy as np
from PIL import Image, ImageDraw

from dino_jax.data.decode import to_png
from dino_jax.errors import UsageError

SIDE = 64  # pixels, of every image
_FINE = 4  # outlines are drawn this many times larger, for smooth edges
_SPLITS = ("train", "val", "test")


def _polar(radii: np.ndarray, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """Points at [n] radii and evenly spaced angles in [start, stop), in turns."""
    return radii * np.exp(2j * np.pi * np.linspace(start, stop, len(radii), endpoint=False))


_CIRCLE = _polar(np.ones(40))

# Outline of each class within the unit circle, [n] points x + iy. A cut connects the ring's hole.
_OUTLINES: dict[str, np.ndarray] = {
    "circle": _CIRCLE,
    "triangle": _polar(np.ones(3)),
    "square": _polar(np.ones(4)),
    "star": _polar(np.tile([1.0, 0.4], 5)),
    "cross": np.outer([1, 1j, -1, -1j], [0.95 - 0.3j, 0.95 + 0.3j, 0.3 + 0.3j]).ravel(),
    "ring": np.concatenate([_CIRCLE, _CIRCLE[:1], 0.55 * _CIRCLE[:1], 0.55 * _CIRCLE[::-1]]),
    "crescent": np.concatenate(
        [_polar(np.ones(30), -0.375, 0.375), _polar(np.full(30, 0.75), 0.305, -0.305) - 0.45]
    ),
    "bar": np.array([-0.96 - 0.27j, 0.96 - 0.27j, 0.96 + 0.27j, -0.96 + 0.27j]),
    "hourglass": np.array([-0.75 - 0.66j, 0.75 - 0.66j, 0.1, 0.75 + 0.66j, -0.75 + 0.66j, -0.1]),
    "flower": _polar(0.7 + 0.3 * np.cos(2 * np.pi * np.arange(48) / 12)),
}

_Y, _X = (np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5) / SIDE - 0.5  # [SIDE, SIDE] each


class ShapesSource:
    """Images, each a pure function of the split and the index."""

    class_names = tuple(_OUTLINES)

    def __init__(self, count: int, split: str, spec: str) -> None:
        self.spec = spec
        self.labels = (np.arange(count) % len(_OUTLINES)).astype(np.int32)
        self._seed = zlib.crc32(split.encode())
        self._outlines = list(_OUTLINES.values())

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        rng = np.random.default_rng((self._seed, index))
        cover = self._cover(rng, index)
        ground = _surface(rng, level=rng.uniform(20, 80), contrast=rng.uniform(0, 30))
        shape = _surface(rng, level=rng.uniform(150, 230), contrast=-rng.uniform(0, 60))
        planes = (ground + (shape - ground) * cover).clip(0, 255).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(np.moveaxis(planes, 0, -1)))

    def encoded(self, index: int) -> bytes:
        return to_png(self.image(index))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.spec} picture {index}"

    stamp = name  # an image is a function of its name

    def mask(self, index: int) -> np.ndarray:
        """The pixels of image `index` that show the shape: [SIDE, SIDE] bool."""
        return self._cover(np.random.default_rng((self._seed, index)), index) >= 0.5

    def _cover(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """Share of each pixel that the shape covers: [SIDE, SIDE] float32 in 0..1.

        `image` and `mask` agree because both make these the first draws from `rng`.
        """
        radius = rng.uniform(0.32, 0.47)
        x, y = rng.uniform(0.42, 0.58, 2)
        angle = rng.uniform(-0.35, 0.35)
        points = self._outlines[self.labels[index]] * cmath.rect(radius, angle) + complex(x, y)
        canvas = Image.new("L", (_FINE * SIDE, _FINE * SIDE))
        ImageDraw.Draw(canvas).polygon((_FINE * SIDE * points).view(float).tolist(), fill=255)
        return np.asarray(canvas.reduce(_FINE)).astype(np.float32) / np.float32(255)


def open_shapes(location: str, split: str | None) -> ShapesSource:
    """Opens `shapes:count[@split]`, by default the split train; see `open_source`."""
    split = split or "train"
    spec = f"shapes:{location}@{split}"
    if not location.isdecimal() or int(location) == 0:
        raise UsageError(f"source {spec!r}: give the number of images, as in shapes:4000")
    if split not in _SPLITS:
        raise UsageError(f"source {spec!r}: no split {split!r}; choose one of {', '.join(_SPLITS)}")
    return ShapesSource(int(location), split, spec)


def _surface(rng: np.random.Generator, *, level: float, contrast: float) -> np.ndarray:
    """A tinted grey level with a random texture: [3, SIDE, SIDE] float32."""
    tint = rng.uniform(-25, 25, (3, 1, 1)).astype(np.float32)
    return np.float32(level) + tint + np.float32(contrast) * _texture(rng)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Plain, noise, gradient, stripes or checks: [SIDE, SIDE] float32 in 0..1."""
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros_like(_X)
    if kind == 1:
        cells = int(rng.integers(6, 24))
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
        smooth = noise.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return np.asarray(smooth).astype(np.float32) / np.float32(255)
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    along, across = cos * _X + sin * _Y, cos * _Y - sin * _X
    if kind == 2:
        return np.clip(along + np.float32(0.5), 0, 1)
    turns = np.float32(2 * math.pi * rng.uniform(6, 14))
    stripes = np.sin(turns * along + np.float32(phase)) > 0
    if kind == 3:
        return stripes.astype(np.float32)
    return (stripes ^ (np.sin(turns * across) > 0)).astype(np.float32)
