"""The state of a run: everything that is passed from one step to the next.

Dims: K prototypes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from dino_jax.models.network import Network, abstract, split

PyTree = Any


@struct.dataclass
class Meters:
    """Sums over the finite steps of the current log interval and of the current epoch.

    They are part of the state so that a resumed run logs the same values as an uninterrupted one.
    """

    interval: dict[str, jax.Array]  # scalars, except teacher_mean [K]
    epoch: dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """The state of a run between two steps, as a pytree of plain dicts and arrays."""

    step: jax.Array  # int32 [], finished steps; determines the position in the data
    params: PyTree  # the student's
    batch_stats: PyTree
    teacher_params: PyTree
    teacher_batch_stats: PyTree
    center: jax.Array  # [1, K]
    opt_state: optax.OptState
    meters: Meters
    skipped_steps: jax.Array  # int32 [], steps without effect, since loss or gradient not finite
    skipped_in_a_row: jax.Array  # int32 []


def init_meters(num_prototypes: int) -> Meters:
    """Sums of zero."""
    scalars = ("steps", "loss", "teacher_entropy", "kl", "grad_norm", "center_change")
    # A separate array for each, because an array that occurs twice cannot be donated.
    return Meters(
        interval={name: jnp.zeros(()) for name in scalars}
        | {"teacher_mean": jnp.zeros(num_prototypes)},
        epoch={name: jnp.zeros(()) for name in ("steps", "loss")},
    )


def start_state(
    params: PyTree,
    batch_stats: PyTree,
    tx: optax.GradientTransformation,
    *,
    num_prototypes: int,
) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        teacher_params=copy(params),
        teacher_batch_stats=copy(batch_stats),
        center=jnp.zeros((1, num_prototypes)),
        opt_state=tx.init(params),
        meters=init_meters(num_prototypes),
        skipped_steps=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def initializer(
    build: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    *,
    num_prototypes: int,
) -> tuple[Network, Callable[[jax.Array], TrainState]]:
    """The network of a model, and a function that creates the initial state from a key.

    No arrays are created here. `jax.eval_shape` of the function gives the shapes, which determine
    the shardings; `jax.jit(function, out_shardings=...)` then creates each array on its devices.
    """
    graphdef, _, _ = abstract(build)

    def init(key: jax.Array) -> TrainState:
        _, params, batch_stats = split(build(nnx.Rngs(key)))
        return start_state(params, batch_stats, tx, num_prototypes=num_prototypes)

    return Network(graphdef), init
