"""What the backward pass of a block recomputes instead of keeping it (rematerialisation)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models.batch_norm import BatchNorm


def _products_saveable(primitive: Any, *args: Any, **params: Any) -> bool:
    """Those of linear layers and convolutions, and not the attention weights."""
    return (
        primitive is jax.lax.conv_general_dilated_p
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    )


POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # keep every activation
    "dots": _products_saveable,  # keep the outputs of linear layers and convolutions
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
}


def check_remat(name: str) -> None:
    """Raises UsageError for an unknown policy."""
    if name not in POLICIES:
        raise UsageError(f"remat={name!r} is unknown: choose one of {', '.join(POLICIES)}")


def run_block(block: nnx.Module, remat: str, *args: jax.Array | None, **static: Any) -> jax.Array:
    """Calls a block under a policy.

    Args:
      block: a part of a network; the running statistics of its BatchNorms move once.
      remat: a key of `POLICIES`.
      *args: the block's arrays.
      **static: its other arguments, which are not traced.
    """
    if remat == "none":
        return block(*args, **static)
    graphdef, arrays = nnx.split(block)

    def call(arrays: nnx.State, *args: jax.Array | None) -> tuple[jax.Array, nnx.State]:
        block = nnx.merge(graphdef, arrays)
        return block(*args, **static), nnx.state(block, nnx.BatchStat)

    output, stats = jax.checkpoint(call, policy=POLICIES[remat])(arrays, *args)
    # Written back where they moved alone: a model in evaluation may be closed over under jit.
    modules = (module for _, module in nnx.iter_modules(block))
    if any(isinstance(m, BatchNorm) and not m.use_running_average for m in modules):
        nnx.update(block, stats)
    return output
