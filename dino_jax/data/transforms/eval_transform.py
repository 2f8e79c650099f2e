"""The evaluation transform on the device: resize the shorter side, crop the centre, normalise.

Dims: B images, S side of the canvas, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dino_jax.data.transforms import color, resample
from dino_jax.errors import UsageError


def eval_transform(
    canvas: jax.Array,
    size: jax.Array,
    done: jax.Array,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Same as torchvision's Resize (bicubic, antialiased), CenterCrop and Normalize.

    Args:
      canvas: [B, S, S, C] uint8, each image in the top left corner.
      size: [B, 2] int32, true height and width of each image.
      done: [B] bool, True for an image that already is the crop, of side `crop`; it is only
        normalised.
      resize: shorter side after resizing, in pixels; the longer side is rounded down.
      crop: side of the central square, in pixels.
      mean: C values on the scale 0..1.
      std: C values on the scale 0..1.

    Returns: [B, crop, crop, C] float32.

    Raises:
      UsageError: `crop` is larger than `resize`.
    """
    if not 1 <= crop <= resize:
        raise UsageError(
            f"crop={crop} must be between 1 and resize={resize}: raise resize, or lower crop"
        )

    def one_image(canvas: jax.Array, size: jax.Array, done: jax.Array) -> jax.Array:
        resized = jnp.where(done, crop, resize * size // size.min())  # [2]
        excess = resized - crop
        # Half of the excess; an odd excess rounds to even, as Python's `round` in torchvision.
        offset = excess // 2 + (excess % 4 == 3)
        rows, columns = (
            resample.cubic_weights(
                0,
                size[axis],
                inputs=canvas.shape[0],
                outputs=crop,
                total=resized[axis],
                first=offset[axis],
            )[None]
            for axis in (0, 1)
        )
        return resample.resample(jnp.moveaxis(canvas, -1, 0), rows, columns)[0]

    size = jnp.where(done[:, None], crop, size)
    return color.normalize(jax.vmap(one_image)(canvas, size, done), mean, std)
