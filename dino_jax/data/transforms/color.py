"""Colour operations on one uint8 crop, rounded as in PIL; batch them with `jax.vmap`.

Like a chain of PIL operations, every operation takes and returns uint8, so values are clipped and
rounded between operations. An image that is not RGB has no colour: it is its own grey version, so
saturation, hue and grayscale do not change it, while brightness and contrast treat it like a grey
image (contrast uses the mean over all channels).

Dims: C channels, H, W sides of the crop. Channels come first: `[C, H, W]`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def blend(planes: jax.Array, kind: jax.Array | int, factor: jax.Array | float) -> jax.Array:
    """Changes brightness, contrast or saturation: `base + factor * (crop - base)`.

    Args:
      planes: [C, H, W] uint8, the crop.
      kind: [] int32, which selects the base: BRIGHTNESS (black), CONTRAST (the crop's rounded mean
        grey level) or SATURATION (the crop's grey version).
      factor: [] float32; 1 returns the crop unchanged, bit for bit.

    Returns: [C, H, W] uint8, truncated as in `PIL.Image.blend`.
    """
    grey = _luma(planes)
    total = grey.astype(jnp.int32).sum()
    mean = ((2 * total + grey.size) // (2 * grey.size)).astype(jnp.float32)
    base = jnp.where(kind == SATURATION, grey, jnp.where(kind == CONTRAST, mean, 0.0))
    blended = base + factor * (planes.astype(jnp.float32) - base)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def hue(planes: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Rotates the hue in PIL's 8-bit HSV.

    Args:
      planes: [3, H, W] uint8, RGB.
      shift: [] float32 in -0.5..0.5 turns; as in torchvision, `trunc(255 * shift)` of 256 steps.
        Zero is not the identity, because 8-bit HSV has fewer colours than RGB.

    Returns: [3, H, W] uint8.
    """
    r, g, b = planes.astype(jnp.float32)
    high, low = jnp.maximum(jnp.maximum(r, g), b), jnp.minimum(jnp.minimum(r, g), b)
    chroma = high - low
    # The hue is measured from yellow (1), cyan (3) or magenta (5 or -1), whichever lacks the lowest
    # channel; `m` is the scaled distance of the middle channel from the highest. This rounds only
    # once, so the 8-bit steps below are at the same hues as PIL's. Ties give the same hue either
    # way.
    m = (2 * high + low - r - g - b) / jnp.maximum(chroma, 1)
    sixths = jnp.where(
        b == low,
        jnp.where(r == high, 1 - m, 1 + m),
        jnp.where(r == low, jnp.where(g == high, 3 - m, 3 + m), jnp.where(b == high, 5 - m, m - 1)),
    )
    # XLA divides by six by multiplying with a rounded 1/6. Adding the exact remainder corrects the
    # quotient, so that it falls on the right side of each step.
    turns = sixths * (1 / 6)
    turns += ((sixths - 4 * turns) - 2 * turns) * (1 / 6)
    turns = jnp.where(turns < 0, turns + 1, turns)
    # A GPU's division may be off in the last bit; 0.001 keeps `floor` from rounding integers down.
    saturation = jnp.floor(255 * chroma / jnp.maximum(high, 1) + 0.001)
    angle = jnp.floor(turns * 255) + jnp.trunc(255 * jnp.asarray(shift, jnp.float32)) % 256
    angle = jnp.where(angle < 256, angle, angle - 256) * (6 / 255)
    missing = [2 - jnp.abs(angle - 3), jnp.abs(angle - 2) - 1, jnp.abs(angle - 4) - 1]
    turned = [high * (1 - saturation * (1 / 255) * jnp.clip(part, 0, 1)) for part in missing]
    return jnp.floor(jnp.stack(turned) + 0.5).astype(jnp.uint8)


def jitter(planes: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
    """Applies brightness, contrast, saturation and hue in a given order.

    Args:
      planes: [C, H, W] uint8.
      order: [4] int32, a permutation of BRIGHTNESS, CONTRAST, SATURATION and HUE.
      factors: [4] float32, indexed by operation: the factors of the three blends and the shift of
        the hue. (1, 1, 1, 0) is the identity: a shift of exactly zero skips the hue.

    Returns: [C, H, W] uint8.
    """
    # The hue costs as much as the three blends together. Four steps that each compute all
    # operations and select one would compute it four times; instead it is computed once, between
    # two runs over the blends, in which a factor of one switches a blend off.
    position = jnp.argmax(order == HUE)
    slots = jnp.arange(3)
    blends = jnp.where(slots < position, order[:3], order[1:])
    strengths = factors[blends]

    def run(planes: jax.Array, active: jax.Array) -> jax.Array:
        steps = (blends, jnp.where(active, strengths, 1.0))
        return lax.scan(lambda planes, step: (blend(planes, *step), None), planes, steps)[0]

    planes = run(planes, slots < position)
    if planes.shape[0] == 3:
        planes = jnp.where(factors[HUE] != 0, hue(planes, factors[HUE]), planes)
    return run(planes, slots >= position)


def grayscale(planes: jax.Array) -> jax.Array:
    """The grey version of a crop: ITU-R 601 luma in all channels, [C, H, W] uint8."""
    return jnp.broadcast_to(_luma(planes).astype(jnp.uint8), planes.shape)


def solarize(planes: jax.Array, threshold: int = 128) -> jax.Array:
    """Inverts all values of at least `threshold`; uint8 of any shape."""
    return jnp.where(planes < threshold, planes, 255 - planes)


def gaussian_blur(planes: jax.Array, radius: jax.Array, max_radius: float) -> jax.Array:
    """Blurs like `PIL.ImageFilter.GaussianBlur`: three box filters along each axis.

    The boxes have fractional ends, the edge pixels are repeated, and every pass rounds to 8 bits.
    Like PIL this uses 24-bit fixed point, so the results are equal bit for bit.

    Args:
      planes: [C, H, W] uint8.
      radius: [] float32, standard deviation in pixels, at most `max_radius`; 0 for no blur.
      max_radius: static upper bound, which sets the width of the padding.

    Returns: [C, H, W] uint8.
    """
    reach = int((math.sqrt(4 * max_radius**2 + 1) - 1) / 2) + 1
    variance = jnp.square(jnp.asarray(radius, jnp.float32)) / 3  # of one of the three passes
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - jnp.square(whole + 1)))
    inner = (2**24 / (2 * (whole + part) + 1)).astype(jnp.uint32)
    outer = (2**24 - (2 * whole.astype(jnp.uint32) + 1) * inner) // 2
    distance = jnp.arange(reach + 1)
    taps = jnp.where(distance <= whole, inner, jnp.where(distance == whole + 1, outer, 0))

    def box(_: int, planes: jax.Array) -> jax.Array:
        width = planes.shape[-1]
        wide = jnp.pad(planes, ((0, 0), (0, 0), (reach, reach)), mode="edge").astype(jnp.uint32)
        total = wide[..., reach : reach + width] * taps[0] + 2**23
        for d in range(1, reach + 1):
            left, right = wide[..., reach - d :], wide[..., reach + d :]
            total += (left[..., :width] + right[..., :width]) * taps[d]
        return (total >> 24).astype(jnp.uint8)

    planes = lax.fori_loop(0, 3, box, planes).swapaxes(-1, -2)
    return lax.fori_loop(0, 3, box, planes).swapaxes(-1, -2)


def normalize(planes: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Converts pixels to the input of a model: (pixels / 255 - mean) / std.

    Args:
      planes: [..., C, H, W] uint8.
      mean: C values on the scale 0..1.
      std: C values on the scale 0..1.

    Returns: [..., H, W, C] float32.
    """
    scale = np.float32(1) / (255 * np.asarray(std, np.float32))
    offset = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    per_channel = (*[1] * (planes.ndim - 1), -1)
    pixels = jnp.moveaxis(planes, -3, -1).astype(jnp.float32)
    return pixels * scale.reshape(per_channel) - offset.reshape(per_channel)


def _luma(planes: jax.Array) -> jax.Array:
    """Grey levels, as integers in float32: [1, H, W] for RGB, else the crop itself, [C, H, W]."""
    if planes.shape[0] != 3:
        return planes.astype(jnp.float32)
    r, g, b = planes.astype(jnp.float32)
    # PIL's 16-bit fixed point, exact in float32.
    return jnp.floor((19595 * r + 38470 * g + 7471 * b + 32768) / 65536)[None]
