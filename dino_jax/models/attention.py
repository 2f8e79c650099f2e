"""Multi-head self-attention, and the kernel that computes it.

Dims: B images, N tokens, M queries, D width, h heads, d = D / h.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.layers import normal_init

KERNELS = ("xla", "cudnn")  # products and a softmax by the compiler; one kernel for GPUs


class Attention(nnx.Module):
    """Multi-head self-attention; one matrix makes queries, keys and values, in that order.

    Args:
      dim: width D.
      num_heads: heads h; divides D.
      kernel: one of `KERNELS`; cudnn wants a GPU and a compute dtype of 16 bits.
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
        """Softmax over the keys in float32: [B, h, M, d], [B, h, N, d] -> [B, h, M, N]."""
        logits = jnp.matmul(
            q * q.shape[-1] ** -0.5,
            k.swapaxes(-1, -2),
            preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
        )
        return jax.nn.softmax(logits, axis=-1)

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, D] -> three of [B, h, N, d]; heads lead, as batched products want them."""
        heads = [
            part.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        ]
        return heads[0], heads[1], heads[2]

    def __call__(self, x: jax.Array, *, class_only: bool = False) -> jax.Array:
        """[B, N, D] -> [B, N, D], or [B, 1, D] for the class token alone."""
        q, k, v = self.queries_keys_values(x)
        if self.kernel == "cudnn" and not class_only:  # one query is no work for it
            mixed = cudnn_attention(q, k, v)
        else:
            q = q[:, :, :1] if class_only else q
            mixed = self.weights(q, k).astype(v.dtype) @ v
        return self.proj(mixed.swapaxes(1, 2).reshape(x.shape[0], -1, x.shape[-1]))


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v in cuDNN's fused kernel: three of [B, h, N, d] -> [B, h, N, d]."""
    tokens_lead = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(*tokens_lead, implementation="cudnn").swapaxes(1, 2)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same by its definition, in the dtype of the arguments."""
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2))
    return jax.nn.softmax(logits, axis=-1) @ v


def check_kernel(kernel: str, dtype: Dtype | None) -> None:
    """Raises UsageError for an unknown kernel, or one that cannot compute in this dtype."""
    if kernel not in KERNELS:
        raise UsageError(f"attention={kernel!r} is unknown: choose one of {', '.join(KERNELS)}")
    if kernel == "cudnn" and (dtype is None or jnp.dtype(dtype).itemsize != 2):
        raise UsageError("attention='cudnn' computes in 16 bits: give dtype=jnp.bfloat16 with it")
