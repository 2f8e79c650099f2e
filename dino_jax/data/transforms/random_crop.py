"""The random crop used to train a linear classifier, made on the device.

Dims: B images, S side of the canvas, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dino_jax.data.transforms import color, resample
from dino_jax.data.transforms.multicrop import BOX_DRAWS, sample_boxes


def random_crop(
    canvas: jax.Array,
    size: jax.Array,
    keys: jax.Array,
    *,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    scale: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_prob: float = 0.5,
) -> jax.Array:
    """Same as torchvision's RandomResizedCrop (bilinear, antialiased) and RandomHorizontalFlip.

    Args:
      canvas: [B, S, S, C] uint8, each image in the top left corner.
      size: [B, 2] int32, true height and width of each image.
      keys: [B] typed PRNG keys; an image's crop depends on its own key only.
      side: side of the crops, in pixels.
      mean: C values on the scale 0..1.
      std: C values on the scale 0..1.
      scale: smallest and largest share of the image's area.
      aspect_ratio: smallest and largest width / height.
      flip_prob: probability of a horizontal flip.

    Returns: [B, side, side, C] float32, normalised.
    """

    def one_image(canvas: jax.Array, size: jax.Array, key: jax.Array) -> jax.Array:
        *draws, flip = jax.random.uniform(key, (BOX_DRAWS + 1,))
        boxes = sample_boxes(jnp.stack(draws)[None], size, scale, aspect_ratio)  # [1, 4]
        top, left, height, width = boxes[0]
        sizes = {"inputs": canvas.shape[0], "outputs": side}
        rows = resample.triangle_weights(top, height, **sizes)
        columns = resample.triangle_weights(left, width, **sizes, flip=flip < flip_prob)
        return resample.resample(jnp.moveaxis(canvas, -1, 0), rows[None], columns[None])[0]

    return color.normalize(jax.vmap(one_image)(canvas, size, keys), mean, std)
