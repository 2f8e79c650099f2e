"""Propagates object labels through a video by the similarity of patches, without any training.

Paper, section 4.2.2; Jabri et al. 2020, https://arxiv.org/abs/2006.14613. A patch gets the mean
label of the most similar patches, among those near its position in the first frame and in the
latest frames.

Dims: h, w rows and columns of patches, D feature width, C classes (background first), F frames in
memory, P pixels per patch side.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dino_jax.data.transforms import color, resample
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.tokens import intermediate_layers, unit_rows

HIGHEST = lax.Precision.HIGHEST
MULTIPLE = 64  # pixels; the longer side of a frame is reduced to a multiple of it


@dataclasses.dataclass(frozen=True)
class Propagation:
    """How labels are propagated; the defaults are those of the paper.

    Raises:
      UsageError: a value is out of range.
    """

    last_frames: int = 7  # Frames kept in memory besides the first.
    radius: int = 12  # How far an object may move between frames, in patches.
    top_k: int = 5  # Number of most similar patches, over all frames, that determine a label.
    temperature: float = 0.1  # Temperature of the similarities.

    def __post_init__(self) -> None:
        for name, least in (("last_frames", 0), ("radius", 1), ("top_k", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature} must be above 0; the paper uses 0.1")


class Memory(NamedTuple):
    """The frames that labels come from: the first, and a ring buffer of the latest."""

    features: jax.Array  # [F, h, w, D] of length 1
    labels: jax.Array  # [F, h, w, C]
    is_filled: jax.Array  # [F] bool


@dataclasses.dataclass(frozen=True)
class FramePatches:
    """Patch tokens of frames, resized as in OpenCV (bilinear, not antialiased, 8 bits).

    Attributes:
      size: height and width of the network's input.
      mean: C values on the scale 0..1.
      std: C values.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, model: nnx.Module, canvas: jax.Array, _: jax.Array) -> jax.Array:
        """[B, H, W, C] uint8 whole frames -> [B, h, w, D] of length 1."""
        rows, columns = (
            resample.linear_weights(inputs=inputs, outputs=outputs, step=inputs / outputs)
            for inputs, outputs in zip(canvas.shape[1:3], self.size, strict=True)
        )
        frames = resample.resize_linear(canvas.astype(jnp.float32), rows, columns)
        frames = jnp.floor(frames + 0.5)  # integer grey levels again
        images = color.normalize(jnp.moveaxis(frames, -1, -3), self.mean, self.std)
        tokens = intermediate_layers(model, images, 1)[0][:, 1:]
        grid = (side // model.patch_size for side in self.size)
        return unit_rows(tokens.reshape(len(images), *grid, -1))


def network_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of the network's input.

    Args:
      height: of the frame, pixels.
      width: of the frame, pixels.
      side: length of the shorter side; the longer one is scaled in proportion, and reduced to a
        multiple of `MULTIPLE`.
    """
    longer = max(height, width) * side / min(height, width) // MULTIPLE * MULTIPLE
    return (int(longer), side) if height > width else (side, int(longer))


def initial_memory(features: jax.Array, labels: np.ndarray, settings: Propagation) -> Memory:
    """The memory after the first frame.

    Args:
      features: [h, w, D] of length 1.
      labels: [h, w, C] shares of each class in each patch.
      settings: determine the size of the memory.
    """
    frames = 1 + settings.last_frames
    room = [jnp.zeros((frames, *x.shape), jnp.float32).at[0].set(x) for x in (features, labels)]
    return Memory(*room, jnp.arange(frames) == 0)


def propagate(target: jax.Array, memory: Memory, settings: Propagation) -> jax.Array:
    """Labels of the patches of a frame, from those in memory.

    Args:
      target: [h, w, D] of length 1.
      memory: the frames that labels come from.
      settings: which patches count, and how much.
    Returns: [h, w, C].
    """
    height, width, _ = target.shape
    band = min(2 * settings.radius + 1, height)  # rows that can affect a row of patches
    columns = jnp.arange(width)
    near_columns = jnp.abs(columns[:, None] - columns) <= settings.radius  # [w, w]

    def one_row(y: jax.Array) -> jax.Array:
        first = jnp.clip(y - settings.radius, 0, height - band)
        features, labels = (
            lax.dynamic_slice_in_dim(frames, first, band, axis=1)
            for frames in (memory.features, memory.labels)
        )  # [F, band, w, D], [F, band, w, C]
        cosines = jnp.einsum("xd,frcd->xfrc", target[y], features, precision=HIGHEST)
        near_rows = jnp.abs(first + jnp.arange(band) - y) <= settings.radius
        counts = memory.is_filled[:, None, None] & near_rows[:, None] & near_columns[:, None, None]
        cosines = jnp.where(counts, cosines, -jnp.inf).reshape(width, -1)
        # Relative to the best: same shares, but no temperature can under- or overflow.
        best = cosines.max(axis=1, keepdims=True)
        affinity = jnp.exp((cosines - best) / settings.temperature)
        least = lax.top_k(affinity, min(settings.top_k, affinity.shape[1]))[0][:, -1:]
        affinity = jnp.where(affinity >= least, affinity, 0)
        shares = affinity / affinity.sum(axis=1, keepdims=True)
        return jnp.matmul(shares, labels.reshape(-1, labels.shape[-1]), precision=HIGHEST)

    # Row by row, as the similarities of all patches at once would take gigabytes.
    return lax.map(one_row, jnp.arange(height))


def label_map(labels: jax.Array, patch_size: int) -> jax.Array:
    """The class of each pixel: soft labels [h, w, C] -> [h * P, w * P] uint8.

    Upsampled bilinearly; each class is rescaled to 0..1, so that small objects are not outvoted.
    """
    rows, columns = (
        resample.linear_weights(inputs=n, outputs=n * patch_size, step=1 / patch_size)
        for n in labels.shape[:2]
    )
    labels = resample.resize_linear(labels, rows, columns)
    labels -= labels.min(axis=(0, 1))
    labels /= jnp.maximum(labels.max(axis=(0, 1)), jnp.finfo(labels.dtype).tiny)
    return labels.argmax(axis=-1).astype(jnp.uint8)


def follow(
    memory: Memory, target: jax.Array, slot: jax.Array, settings: Propagation, patch_size: int
) -> tuple[Memory, jax.Array]:
    """Labels a frame and stores it in memory.

    Args:
      memory: the frames that labels come from.
      target: [h, w, D] of length 1.
      slot: [] int32, the memory slot to overwrite; the frame is dropped if it is out of range.
      settings: of the propagation.
      patch_size: P.
    Returns: the updated memory, and the label map of the frame, [h * P, w * P] uint8.
    """
    labels = propagate(target, memory, settings)
    memory = Memory(
        memory.features.at[slot].set(target, mode="drop"),
        memory.labels.at[slot].set(labels, mode="drop"),
        memory.is_filled.at[slot].set(True, mode="drop"),
    )
    return memory, label_map(labels, patch_size)
