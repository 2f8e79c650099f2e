"""Features of whole pictures at one or several scales, and which pictures can share a batch.

Dims: B images, H and W sides of a canvas, C channels, D feature width.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dino_jax.data.transforms import color, resample
from dino_jax.evaluate.features.picture_pass import Group

Size = tuple[int, int]  # height and width in pixels

SCALES = (1.0, 2**-0.5, 0.5)  # the reference's three


@dataclasses.dataclass(frozen=True)
class AtScales:
    """The mean of the features of a picture at several scales (bilinear, not antialiased).

    Attributes:
      scales: of the picture.
      shapes: for each scale the input shape of the network, from `network_shapes`.
      mean: C values on the scale 0..1.
      std: C values.
    """

    scales: tuple[float, ...]
    shapes: tuple[Size, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, model: nnx.Module, canvas: jax.Array, size: jax.Array) -> jax.Array:
        """[B, H, W, C] uint8 canvases and [B, 2] sizes -> [B, D]."""
        images = color.normalize(jnp.moveaxis(canvas, -1, -3), self.mean, self.std)
        features = 0.0
        for scale, (height, width) in zip(self.scales, self.shapes, strict=True):
            if scale == 1:
                scaled = images[:, :height, :width]
            else:
                scaled = jax.vmap(_scaled, (0, 0, None, None))(images, size, scale, (height, width))
            features += model(scaled)
        return features / len(self.scales)


def network_shapes(size: Size, scales: Sequence[float], patch_size: int | None) -> tuple[Size, ...]:
    """The input shape of the network at each scale; pictures with equal shapes share batches.

    Args:
      size: of the picture.
      scales: as in `AtScales`.
      patch_size: of a ViT, which ignores pixels beyond the last whole patch; None for a network
        that uses every pixel.
    """
    shapes = []
    for scale in scales:
        height, width = (math.floor(side * scale) for side in size)
        if patch_size is not None:
            is_square = height == width
            height, width = (side // patch_size * patch_size for side in (height, width))
            # Only for square inputs does a ViT use its position embeddings without interpolation.
            # An extra column of pixels, which no patch covers, marks the other pictures.
            width += height == width and not is_square
        shapes.append((height, width))
    return tuple(shapes)


def group_by_shape(
    sizes: Mapping[int, Size],
    scales: Sequence[float],
    patch_size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[AtScales, Group]:
    """Groups pictures with the same input shapes.

    Args:
      sizes: of each picture, by its ascending index.
      scales: as in `AtScales`.
      patch_size: as in `network_shapes`.
      mean: as in `AtScales`.
      std: as in `AtScales`.
    Returns: a group for each feature function, the largest pictures first, so that a lack of memory
      shows at once.
    """
    members = defaultdict(list)
    for index, size in sizes.items():
        members[network_shapes(size, scales, patch_size)].append(index)
    groups = {}
    for shapes in sorted(members, key=lambda shapes: -math.prod(shapes[0])):
        sides = [*shapes, *(sizes[index] for index in members[shapes])]
        canvas = max(height for height, _ in sides), max(width for _, width in sides)
        groups[AtScales(tuple(scales), shapes, tuple(mean), tuple(std))] = Group(
            members[shapes], canvas
        )
    return groups


def _scaled(image: jax.Array, size: jax.Array, scale: float, shape: Size) -> jax.Array:
    """[H, W, C] and its [2] size -> [*shape, C]."""
    rows, columns = (
        resample.linear_weights(
            inputs=image.shape[axis], outputs=shape[axis], step=1 / scale, length=size[axis]
        )
        for axis in (0, 1)
    )
    return resample.resize_linear(image, rows, columns)
