"""The choice of the kernel that computes attention, checked on the device that will use it."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.errors import UsageError
from dino_jax.models.attention import KERNELS, cudnn_attention, plain_attention
from dino_jax.sharding import batch_sharded, make_mesh

TOLERANCE = 0.03  # of a kernel's results, as a share of the largest; bfloat16 itself costs 0.01


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
