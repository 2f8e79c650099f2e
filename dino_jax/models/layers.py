"""Layers and initializers that the architectures share.

Dims: B images, N tokens, D width.
"""

from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError

# The reference truncates this normal at +-2, which is a hundred standard deviations: no effect.
normal_init = nnx.initializers.normal(0.02)


def torch_uniform_init(fan_in: int) -> nnx.Initializer:
    """Torch's default for linear and convolutional layers: uniform within +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def check_counts(**counts: int) -> None:
    """Raises UsageError, with the argument's name, for a count that is not a positive integer."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise UsageError(f"{name}={count!r} must be a whole number of at least 1")


def check_images(images: jax.Array, in_channels: int, least: int, reason: str) -> None:
    """Raises UsageError for images of the wrong shape or of integers.

    Args:
      images: must be floating point, [B, H, W, C] with B of at least 1.
      in_channels: required C.
      least: smallest H and W, in pixels.
      reason: what `least` pixels are, for the message.
    """
    shape = images.shape
    if len(shape) != 4 or shape[3] != in_channels or min(shape[1:3]) < least or shape[0] < 1:
        raise UsageError(
            f"images of shape {shape} do not fit this model: it takes [B, H, W, {in_channels}] "
            f"with B of at least 1, and H and W of at least {least} ({reason})"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(
            f"images of dtype {images.dtype} do not fit this model: it takes normalized images in "
            "floating point; prepare them with `info.preprocess`, where info comes from "
            "`dino_jax.load`"
        )


def image_draws(keys: jax.Array | None, blocks: int, branches: int) -> list[jax.Array | None]:
    """Uniform random numbers for stochastic depth, from each image's own key.

    Args:
      keys: [B] typed PRNG keys, or None to drop nothing.
      blocks: number of blocks of the network.
      branches: number of residual branches of a block.
    Returns: for every block [B, branches], or None if `keys` is None.
    """
    if keys is None:
        return [None] * blocks
    draws = jax.vmap(lambda key: jax.random.uniform(key, (blocks, branches)))(keys)
    return list(draws.swapaxes(0, 1))


def at_least_float32(x: jax.Array) -> jax.Array:
    """Promotes half precision to float32 and leaves float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Scales x to norm 1 along an axis, like torch's `normalize`; float32 or wider."""
    wide = at_least_float32(x)
    square_norm = jnp.sum(wide * wide, axis=axis, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.maximum(square_norm, 1e-24))


def drop_path(branch: jax.Array, draw: jax.Array | None, rate: float) -> jax.Array:
    """Drops a residual branch for some images, and scales up the others (stochastic depth).

    Args:
      branch: [B, N, D].
      draw: [B] uniform in [0, 1), or None to keep every branch.
      rate: probability of dropping the branch.
    Returns: [B, N, D], zero where dropped.
    """
    if draw is None or rate == 0.0:
        return branch
    scaled = at_least_float32(branch) / (1.0 - rate)  # bfloat16 would round the factor
    return jnp.where((draw >= rate)[:, None, None], scaled, 0.0).astype(branch.dtype)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm whose backward pass saves only the input, which other layers need anyway."""

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, arrays = nnx.split(self)
        return jax.checkpoint(
            lambda arrays, x: nnx.LayerNorm.__call__(nnx.merge(graphdef, arrays), x)
        )(arrays, x)


def layer_norm(dim: int, *, dtype: Dtype | None, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm with the reference's epsilon, and the variance in two passes, as in torch."""
    return LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; its backward pass saves only the input."""
    return jax.nn.gelu(x, approximate=False)


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: Dtype | None, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))
