"""Convolutions with torch's padding. Dims: B images, H and W pixels, C channels."""

import jax
from flax import nnx
from flax.typing import Dtype

from dino_jax.models.batch_norm import BatchNorm
from dino_jax.models.layers import torch_uniform_init


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: nnx.Initializer | None = None,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution with torch's padding: equal on all sides, so that stride 1 keeps the size.

    With stride 2, XLA's "SAME" would pad less at the left and top than torch.

    Args:
      in_features: channels of the input; a multiple of `groups`.
      out_features: channels of the output; a multiple of `groups`.
      kernel_size: side of the square kernel; odd.
      stride: stride in both directions.
      groups: number of groups of channels that are convolved separately.
      use_bias: add a bias.
      kernel_init: by default torch's; the bias always has torch's.
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.
    Returns: a module [B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out].
    """
    uniform = torch_uniform_init(kernel_size**2 * in_features // groups)
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=kernel_size // 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init or uniform,
        bias_init=uniform,
        dtype=dtype,
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """A convolution without bias, followed by BatchNorm; see `conv` for the arguments."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_init: nnx.Initializer | None = None,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = conv(
            in_features,
            out_features,
            kernel_size,
            stride=stride,
            groups=groups,
            use_bias=False,
            kernel_init=kernel_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]."""
        return self.norm(self.conv(x))
