"""PIL's antialiased resampling, bicubic or bilinear, as two small matrix products.

A crop is resized by one matrix over its columns and one over its rows. The matrices span the whole
canvas, with zeros outside the crop's box. So all images of a batch have the same shapes, and the
filter sees no pixel outside the box, as if the crop had been cut out first.

The width is resized first, as in the reference and in Pillow before 13. Pillow 13 resizes the
height first if it shrinks, and by more than twice as many pixels as the width. No default crop of a
large image is affected, but a fifth of those of 256x256 images: photographs then differ by about
0.2 grey levels on average, single values by up to 9. Reproducing this would need both orders of
products for every crop, or one copy of the canvas per crop.

Dims: C channels, S side of the canvas, N crops of an image, h, w sides of a crop after resizing.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def cubic(t: jax.Array) -> jax.Array:
    """PIL's bicubic filter (a = -0.5) at distances t >= 0."""
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((2.5 - 0.5 * t) * t - 4) * t + 2
    return jnp.where(t < 1, near, jnp.where(t < 2, far, 0.0))


def triangle(t: jax.Array) -> jax.Array:
    """PIL's bilinear filter at distances t >= 0."""
    return jnp.maximum(0.0, 1 - t)


def filter_weights(
    start: jax.Array | int,
    length: jax.Array | int,
    *,
    inputs: int,
    outputs: int,
    total: jax.Array | int | None = None,
    first: jax.Array | int = 0,
    flip: jax.Array | bool = False,
    kernel: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Weights of a PIL filter along one axis; the filter is widened when shrinking.

    The box `[start, start + length)` is resized to `total` pixels; the outputs are the pixels
    `[first, first + outputs)` of these.

    Args:
      start: [] int32, first input pixel of the box.
      length: [] int32, pixels in the box, at least 1.
      inputs: pixels along the axis of the canvas, which contains the box.
      outputs: output pixels.
      total: [] int32, pixels of the whole box after resizing; by default `outputs`.
      first: [] int32, first output pixel among `total`.
      flip: [] bool, mirrors the outputs.
      kernel: the filter, `cubic` or `triangle`.

    Returns: [outputs, inputs] float32; every row sums to one.
    """
    total = outputs if total is None else total
    target = jnp.arange(outputs)
    target = first + jnp.where(flip, outputs - 1 - target, target)[:, None]  # [outputs, 1]
    source = jnp.arange(inputs)[None] - start  # [1, inputs]
    # Distance between pixel centres in units of the filter. The numerator is an exact integer; a
    # difference of float32 positions would cancel most of its digits.
    numerator = (2 * source + 1) * total - (2 * target + 1) * length
    t = jnp.abs(numerator).astype(jnp.float32) / (2.0 * jnp.maximum(total, length))
    weights = jnp.where((source >= 0) & (source < length), kernel(t), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


cubic_weights = partial(filter_weights, kernel=cubic)
triangle_weights = partial(filter_weights, kernel=triangle)


def resample(planes: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Makes N crops of an image, each from its two weight matrices.

    As in PIL, the result of the first pass is rounded to 8 bits.

    Args:
      planes: [C, S, S] uint8.
      rows: [N, h, S] float32, from `filter_weights`.
      columns: [N, w, S] float32.

    Returns: [N, C, h, w] uint8.
    """
    narrow = _multiply("nwx,cyx->ncyw", columns, planes)
    return _multiply("nhy,ncyw->nchw", rows, narrow)


def _multiply(equation: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
    """Product of weights and uint8 pixels, rounded to uint8.

    On accelerators the default precision would round the weights to bfloat16 or TF32, which gives
    errors of up to half a grey level, or a darker image.
    """
    product = lax.platform_dependent(
        weights,
        pixels,
        cuda=lambda weights, pixels: tensor_core_product(equation, weights, pixels),
        default=lambda weights, pixels: jnp.einsum(
            equation, weights, pixels.astype(jnp.float32), precision=lax.Precision.HIGHEST
        ),
    )
    return jnp.clip(jnp.floor(product + 0.5), 0, 255).astype(jnp.uint8)


def tensor_core_product(equation: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
    """Einsum with float16 operands and float32 sums, as exact as one in full float32.

    Integers up to 255 are exact in float16, and a weight is the sum of two float16 numbers to
    within 2**-24. Two such products take a fraction of the time of one in float32, which NVIDIA's
    tensor cores do not support.

    Args:
      equation: the einsum equation of weights and pixels.
      weights: float32, of magnitude up to about 1.
      pixels: uint8.

    Returns: float32.
    """
    # XLA may remove a conversion to float16 and back, so that the remainder would be zero.
    coarse = lax.reduce_precision(weights, exponent_bits=5, mantissa_bits=10)
    pixels = pixels.astype(jnp.float16)
    return sum(
        jnp.einsum(equation, part.astype(jnp.float16), pixels, preferred_element_type=jnp.float32)
        for part in (coarse, weights - coarse)
    )


def linear_weights(
    *, inputs: int, outputs: int, step: float, length: jax.Array | int | None = None
) -> jax.Array:
    """Weights of plain bilinear interpolation along one axis, without antialiasing.

    Same as torch's `interpolate` without `align_corners` and OpenCV's `INTER_LINEAR`: output pixel
    i is at input position (i + 0.5) * step - 0.5, clipped to the image.

    Args:
      inputs: pixels along the axis of the canvas.
      outputs: output pixels.
      step: input pixels per output pixel, 1 / scale.
      length: [] int32, pixels of the image on the canvas; by default all.

    Returns: [outputs, inputs] float32; every row sums to one.
    """
    last = (inputs if length is None else length) - 1
    place = jnp.clip((jnp.arange(outputs) + 0.5) * step - 0.5, 0, last)
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - jnp.arange(inputs)[None]))


def resize_linear(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Resizes images by the weights of their two axes, in float32.

    Args:
      images: [..., H, W, C].
      rows: [h, H], from `linear_weights`.
      columns: [w, W].

    Returns: [..., h, w, C].
    """
    return jnp.einsum(
        "hH,wW,...HWC->...hwC", rows, columns, images, precision=lax.Precision.HIGHEST
    )
