"""Multi-head self-attention, and the kernel that computes it.

Dims: B images, N tokens, M queries, D width, h heads, d = D / h.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.initializers import normal_init
from dino_jax.sharding import batch_sharded, make_mesh

KERNELS = ("xla", "cudnn")  # products and a softmax by the compiler; one kernel for GPUs
TOLERANCE = 0.03  # of a kernel's results, as a share of the largest; bfloat16 itself costs 0.01


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


class KernelChoice(NamedTuple):
    """A kernel, and a sentence where it is not the one that was asked for."""

    kernel: str
    note: str | None = None


@cache
def choose_kernel(
    asked: str, dtype: Any, *, num_heads: int, head_dim: int, lengths: tuple[int, ...]
) -> KernelChoice:
    """The kernel to compute attention with; cuDNN's only after it has proved itself here.

    Args:
      asked: "auto" is cuDNN's where it can be had; or one of `KERNELS`.
      dtype: compute dtype of the network.
      num_heads: heads h.
      head_dim: width d of a head.
      lengths: the numbers of tokens N that it will be used for.
    Raises:
      UsageError: an unknown kernel.
    """
    if asked not in ("auto", *KERNELS):
        raise UsageError(
            f"model.attention={asked!r} is unknown: choose one of auto, {', '.join(KERNELS)}"
        )
    possible = jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
    if asked == "xla" or (asked == "auto" and not possible):
        return KernelChoice("xla")
    if not possible:
        return KernelChoice(
            "xla",
            f"model.attention=cudnn is for bfloat16 on a GPU, not for {jnp.dtype(dtype).name} on "
            f"{jax.default_backend()}: attention is left to XLA",
        )
    for length in lengths:
        if wrong := what_is_wrong(cudnn_attention, (num_heads, length, head_dim), dtype):
            return KernelChoice("xla", f"cuDNN's attention {wrong}: it is left to XLA")
    return KernelChoice("cudnn")


def what_is_wrong(
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    shape: tuple[int, int, int],
    dtype: Any,
) -> str | None:
    """Compares a kernel's result and gradients with those of `plain_attention` in float32.

    Every device of this process takes two images, as a batch is spread in training.

    Args:
      attend: the kernel: queries, keys and values [B, h, N, d] -> [B, h, N, d].
      shape: h, N, d to try it with.
      dtype: of what it is given.
    Returns: what is wrong with it, None for nothing.
    """

    def results(attend: Callable[..., jax.Array], *arrays: jax.Array) -> list[jax.Array]:
        output, pull_back = jax.vjp(attend, *arrays[:3])
        return [output, *pull_back(arrays[3])]

    # This may be called while a network is being traced; the check itself has numbers.
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), 4)
        mesh = make_mesh(jax.local_devices())
        arrays = [jax.random.normal(key, (2 * mesh.size, *shape), dtype) for key in keys]
        arrays = jax.device_put(arrays, batch_sharded(mesh))
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in arrays]
            expected = jax.jit(partial(results, plain_attention))(*wide)
        try:
            computed = jax.jit(partial(results, attend))(*arrays)
            pairs = zip(*jax.device_get((computed, expected)), strict=True)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return f"cannot be used for {shape[1]} tokens ({str(error).strip().splitlines()[0]})"
    apart = np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])
    if not apart <= TOLERANCE:  # nor a NaN
        return f"is {apart:.2g} of its largest value off for {shape[1]} tokens"
    return None
