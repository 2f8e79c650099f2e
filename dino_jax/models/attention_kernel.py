"""The choice of the kernel that computes attention, checked on the device that will use it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.distributed import least_of_hosts
from dino_jax.errors import UsageError
from dino_jax.models.attention import KERNELS, cudnn_attention, plain_attention
from dino_jax.sharding import batch_sharded, make_mesh

TOLERANCE = 0.03  # largest error, as a share of the largest value; bfloat16 alone costs 0.01


class KernelChoice(NamedTuple):
    """A kernel, and a log note if it is not the requested one."""

    kernel: str
    note: str | None = None


def choose_kernel(
    asked: str,
    dtype: Any,
    *,
    num_heads: int,
    head_dim: int,
    lengths: tuple[int, ...],
    platform: str,
    devices: Sequence[jax.Device],
) -> KernelChoice:
    """The kernel to compute attention with; cuDNN's only after a check on the devices.

    Args:
      asked: one of `KERNELS`, or "auto" for cuDNN's kernel where it works.
      dtype: compute dtype of the network.
      num_heads: heads h.
      head_dim: width d of a head.
      lengths: the numbers of tokens N to check.
      platform: the platform the model will run on.
      devices: this process's devices, used for the check; if empty, the check is skipped.
    Raises:
      UsageError: an unknown kernel.
    """
    if asked not in ("auto", *KERNELS):
        raise UsageError(
            f"model.attention={asked!r} is unknown: choose one of auto, {', '.join(KERNELS)}"
        )
    possible = platform == "gpu" and jnp.dtype(dtype).itemsize == 2
    if asked == "xla" or (asked == "auto" and not possible):
        return KernelChoice("xla")
    if not possible:
        return KernelChoice(
            "xla",
            f"model.attention=cudnn needs bfloat16 on a GPU; with {jnp.dtype(dtype).name} on "
            f"{platform} XLA computes the attention",
        )
    wrong = None
    for length in lengths if devices else ():
        shape = num_heads, length, head_dim
        wrong = wrong or what_is_wrong(cudnn_attention, shape, dtype, devices)
    if least_of_hosts(not wrong):
        return KernelChoice("cudnn")
    return KernelChoice(
        "xla", f"cuDNN's attention {wrong or 'fails on another host'}: XLA computes it instead"
    )


def what_is_wrong(
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    shape: tuple[int, int, int],
    dtype: Any,
    devices: Sequence[jax.Device],
) -> str | None:
    """Compares a kernel's output and gradients with those of `plain_attention` in float32.

    Args:
      attend: the kernel: queries, keys and values [B, h, N, d] -> [B, h, N, d].
      shape: (h, N, d) to try.
      dtype: of queries, keys and values.
      devices: each computes two images, spread as a training batch is.
    Returns: what is wrong, as the end of a sentence; None if nothing is.
    """

    def results(attend: Callable[..., jax.Array], *arrays: jax.Array) -> list[jax.Array]:
        output, pull_back = jax.vjp(attend, *arrays[:3])
        return [output, *pull_back(arrays[3])]

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (2 * len(devices), *shape), dtype) for key in keys]
    arrays = jax.device_put(arrays, batch_sharded(make_mesh(devices)))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        expected = jax.jit(partial(results, plain_attention))(*wide)
    try:
        computed = jax.jit(partial(results, attend))(*arrays)
        pairs = zip(*jax.device_get((computed, expected)), strict=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"does not work for {shape[1]} tokens ({str(error).strip().splitlines()[0]})"
    error = np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])
    if not error <= TOLERANCE:  # also true for NaN
        return f"is off by {error:.2g} of its largest value for {shape[1]} tokens"
    return None
