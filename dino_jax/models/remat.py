"""Rematerialisation: which activations the backward pass recomputes instead of saving them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models.batch_norm import BatchNorm


def _products_saveable(primitive: Any, *args: Any, **params: Any) -> bool:
    """True for outputs of linear layers and convolutions, but not for attention weights."""
    return (
        primitive is jax.lax.conv_general_dilated_p
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    )


POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # save all activations
    "dots": _products_saveable,  # save the outputs of linear layers and convolutions
    "full": jax.checkpoint_policies.nothing_saveable,  # save only the input of each block
}


def check_remat(name: str) -> None:
    """Raises UsageError for an unknown policy."""
    if name not in POLICIES:
        raise UsageError(f"remat={name!r} is unknown: choose one of {', '.join(POLICIES)}")


def run_block(block: nnx.Module, remat: str, *args: jax.Array | None, **static: Any) -> jax.Array:
    """Calls a block with a rematerialisation policy.

    Args:
      block: a part of a network; its BatchNorms' running statistics are updated once.
      remat: a key of `POLICIES`.
      *args: the block's array arguments.
      **static: the block's other arguments, which are not traced.
    Returns: the block's output.
    """
    if remat == "none":
        return block(*args, **static)
    graphdef, arrays = nnx.split(block)

    def call(arrays: nnx.State, *args: jax.Array | None) -> tuple[jax.Array, nnx.State]:
        block = nnx.merge(graphdef, arrays)
        return block(*args, **static), nnx.state(block, nnx.BatchStat)

    output, stats = jax.checkpoint(call, policy=POLICIES[remat])(arrays, *args)
    # Only in training mode: a model in evaluation mode may be a constant of a jitted function, and
    # must not be updated there.
    modules = (module for _, module in nnx.iter_modules(block))
    if any(isinstance(m, BatchNorm) and not m.use_running_average for m in modules):
        nnx.update(block, stats)
    return output
