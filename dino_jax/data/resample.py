"""PIL's antialiased bicubic resampling as two small matrix products.

A crop is resized by one matrix over its columns and one over its rows. The matrices span the whole
canvas, with zeros outside the crop's box, so every image of a batch has the same shapes and the
filter never sees a pixel beyond the box, as if the crop had been cut out first.

Dims: C channels, S side of the canvas, N crops of an image, h, w sides of a crop after resizing.
"""

import jax
import jax.numpy as jnp
from jax import lax


def cubic_weights(
    start: jax.Array | int,
    length: jax.Array | int,
    *,
    inputs: int,
    outputs: int,
    total: jax.Array | int | None = None,
    first: jax.Array | int = 0,
    flip: jax.Array | bool = False,
) -> jax.Array:
    """Weights of PIL's bicubic filter (a = -0.5, widened when shrinking) along one axis.

    The box `[start, start + length)` is resized to `total` pixels, of which those from `first` on
    are wanted.

    Args:
      start: [] int32, first input pixel of the box.
      length: [] int32, pixels in the box, at least 1.
      inputs: pixels along the axis of the canvas; the box lies inside.
      outputs: pixels wanted.
      total: [] int32, pixels of the whole box after resizing; None for `outputs`.
      first: [] int32, where among `total` the wanted pixels begin.
      flip: [] bool, mirrors the wanted pixels.

    Returns: [outputs, inputs] float32, every row adding up to one.
    """
    total = outputs if total is None else total
    target = jnp.arange(outputs)
    target = first + jnp.where(flip, outputs - 1 - target, target)[:, None]  # [outputs, 1]
    source = jnp.arange(inputs)[None] - start  # [1, inputs]
    # Distance between pixel centres in units of the filter. Its numerator is an exact integer;
    # as a difference of float32 positions it would lose the digits that matter.
    numerator = (2 * source + 1) * total - (2 * target + 1) * length
    t = jnp.abs(numerator).astype(jnp.float32) / (2.0 * jnp.maximum(total, length))
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((2.5 - 0.5 * t) * t - 4) * t + 2
    weights = jnp.where(t < 1, near, jnp.where(t < 2, far, 0.0))
    weights = jnp.where((source >= 0) & (source < length), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resample(planes: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Makes N crops of an image, each from its two weight matrices.

    As in PIL the width is resized first, and what lies between the passes is 8-bit again.

    Args:
      planes: [C, S, S] uint8.
      rows: [N, h, S] float32, from `cubic_weights`.
      columns: [N, w, S] float32.

    Returns: [N, C, h, w] uint8.
    """
    narrow = _multiply("nwx,cyx->ncyw", columns, planes)
    return _multiply("nhy,ncyw->nchw", rows, narrow)


def _multiply(equation: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
    """Product of weights and uint8 pixels, rounded to uint8; the precision is never the default.

    What an accelerator multiplies in by default (bfloat16, or TF32 by truncation) darkens the
    picture or misses by half a grey level. NVIDIA GPUs get float16 operands instead: pixels are
    exact in it, rounded weights move a sum by less than 0.1 grey level, the sums are float32, and
    the tensor cores run several times faster than full float32 would.
    """
    product = lax.platform_dependent(
        weights,
        pixels,
        cuda=lambda weights, pixels: half_product(equation, weights, pixels),
        default=lambda weights, pixels: jnp.einsum(
            equation, weights, pixels.astype(jnp.float32), precision=lax.Precision.HIGHEST
        ),
    )
    return jnp.clip(jnp.floor(product + 0.5), 0, 255).astype(jnp.uint8)


def half_product(equation: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
    """Einsum with float16 operands and float32 sums, the form for NVIDIA's tensor cores."""
    weights, pixels = weights.astype(jnp.float16), pixels.astype(jnp.float16)
    return jnp.einsum(equation, weights, pixels, preferred_element_type=jnp.float32)
