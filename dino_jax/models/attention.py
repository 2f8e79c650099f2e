"""Multi-head self-attention and its kernels.

Dims: B images, N tokens, M queries, D width, h heads, d = D / h.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.layers import normal_init

KERNELS = ("xla", "cudnn")  # matrix products and a softmax, compiled by XLA; one fused GPU kernel


class Attention(nnx.Module):
    """Multi-head self-attention; one matrix computes queries, keys and values, in that order.

    Args:
      dim: width D.
      num_heads: heads h; must divide D.
      kernel: one of `KERNELS`; cudnn needs a GPU and a 16-bit compute dtype.
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel: str = "xla",
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = num_heads
        self.kernel = kernel
        linear = partial(nnx.Linear, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def weights(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Attention weights in float32: [B, h, M, d], [B, h, N, d] -> [B, h, M, N]."""
        logits = jnp.matmul(
            q * q.shape[-1] ** -0.5,
            k.swapaxes(-1, -2),
            preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
        )
        return jax.nn.softmax(logits, axis=-1)

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, D] -> three arrays [B, h, N, d], with heads first for batched products."""
        heads = [
            part.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        ]
        return heads[0], heads[1], heads[2]

    def __call__(self, x: jax.Array, *, class_only: bool = False) -> jax.Array:
        """[B, N, D] -> [B, N, D], or [B, 1, D] with `class_only`, for the class token only."""
        q, k, v = self.queries_keys_values(x)
        if self.kernel == "cudnn" and not class_only:  # it gains nothing for a single query
            mixed = cudnn_attention(q, k, v)
        else:
            q = q[:, :, :1] if class_only else q
            mixed = self.weights(q, k).astype(v.dtype) @ v
        return self.proj(mixed.swapaxes(1, 2).reshape(x.shape[0], -1, x.shape[-1]))


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v by cuDNN's fused kernel: three [B, h, N, d] -> [B, h, N, d]."""
    tokens_lead = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(*tokens_lead, implementation="cudnn").swapaxes(1, 2)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same as `cudnn_attention`, computed by its definition in the dtype of the arguments."""
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2))
    return jax.nn.softmax(logits, axis=-1) @ v


def check_kernel(kernel: str, dtype: Dtype | None) -> None:
    """Raises UsageError for an unknown kernel, or one that does not support the dtype."""
    if kernel not in KERNELS:
        raise UsageError(f"attention={kernel!r} is unknown: choose one of {', '.join(KERNELS)}")
    if kernel == "cudnn" and (dtype is None or jnp.dtype(dtype).itemsize != 2):
        raise UsageError("attention='cudnn' needs a 16-bit dtype: set dtype=jnp.bfloat16")
