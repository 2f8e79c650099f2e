"""One training step, in the order of the algorithm (Caron et al., 2021, algorithm 1).

Dims: B images, V views, K prototypes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dino_jax.models.network import Network
from dino_jax.sharding import PassLayout, spread_pass
from dino_jax.training.losses import LossOutput, dino_loss, update_center
from dino_jax.training.schedules import Schedule
from dino_jax.training.state import Meters, TrainState

PyTree = Any
Batch = dict[str, jax.Array]
# (batch, epoch) -> (global views [B, 2, ...], local views [B, L, ...]), PRNG keys [B]
MakeViews = Callable[[Batch, jax.Array], tuple[tuple[jax.Array, ...], jax.Array | None]]

MAX_SKIPPED_IN_A_ROW = 3


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step needs in addition to its state and batch."""

    network: Network
    tx: optax.GradientTransformationExtraArgs
    make_views: MakeViews
    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule  # of the teacher's moving average
    teacher_temp: Schedule
    steps_per_epoch: int
    freeze_steps: int  # the last layer is frozen in the first `freeze_steps` steps
    student_temp: float = 0.1
    center_momentum: float = 0.9
    accumulation_steps: int = 1
    log_every: int = 1  # steps in a log interval
    layout: PassLayout | None = None  # None: one device


class _Means(NamedTuple):
    """What a pass returns in addition to gradients, as means over images."""

    loss: LossOutput
    teacher_logits: jax.Array  # [K]


def compile_step(
    settings: StepSettings, state: TrainState, batch: Batch, shardings: TrainState
) -> Callable[[TrainState, Batch], TrainState]:
    """Traces and compiles the step once, for these shapes; it donates the state."""
    platform = next(iter(jax.tree.leaves(shardings)[0].device_set)).platform
    jitted = jax.jit(
        partial(train_step, settings=settings), donate_argnums=0, out_shardings=shardings
    )
    return jitted.lower(state, batch).compile(compiler_options=compiler_options(platform))


def train_step(state: TrainState, batch: Batch, *, settings: StepSettings) -> TrainState:
    """Updates student, teacher and center with one batch.

    A step whose loss or gradient is not finite is skipped: it is counted, but parameters, batch
    statistics, teacher, center and optimizer state stay as they are. Once `MAX_SKIPPED_IN_A_ROW`
    steps in a row have been skipped, all later ones are skipped too.

    Args:
      state: the state before the step.
      batch: arrays with leading axis B, the input of `settings.make_views`.
      settings: network, optimizer, schedules.
    Returns: the state after the step.
    """
    step = state.step
    grads, means, stats = _forward_backward(state, batch, settings)
    batch_stats, teacher_batch_stats = stats
    grad_norm = optax.tree.norm(grads)

    updates, opt_state = settings.tx.update(
        grads,
        state.opt_state,
        state.params,
        learning_rate=settings.lr(step),
        weight_decay=settings.weight_decay(step),
        frozen=step < settings.freeze_steps,
    )
    params = optax.apply_updates(state.params, updates)
    momentum = settings.momentum(step)
    teacher_params = jax.tree.map(
        lambda teacher, student: momentum * teacher + (1 - momentum) * student,
        state.teacher_params,
        params,
    )
    center = update_center(state.center, means.teacher_logits, settings.center_momentum)

    finite = jnp.isfinite(means.loss.loss) & jnp.isfinite(grad_norm)
    meters = _reset(state.meters, step, settings)
    measured = means.loss._asdict() | {
        "steps": jnp.ones(()),
        "grad_norm": grad_norm,
        "center_change": jnp.linalg.norm(center - state.center),
    }
    after = state.replace(
        params=params,
        batch_stats=batch_stats,
        teacher_params=teacher_params,
        teacher_batch_stats=teacher_batch_stats,
        center=center,
        opt_state=opt_state,
        meters=jax.tree.map(
            lambda total, value: total + value.astype(total.dtype),
            meters,
            Meters(
                interval={name: measured[name] for name in meters.interval},
                epoch={name: measured[name] for name in meters.epoch},
            ),
        ),
    )
    before = state.replace(meters=meters)
    # After too many skipped steps the run will be stopped; until then its state must not change.
    accept = finite & (state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW)
    return optax.tree.where(accept, after, before).replace(
        step=step + 1,
        skipped_steps=state.skipped_steps + ~accept,
        skipped_in_a_row=jnp.where(accept, 0, state.skipped_in_a_row + 1),
    )


def _forward_backward(
    state: TrainState, batch: Batch, settings: StepSettings
) -> tuple[PyTree, _Means, tuple[PyTree, PyTree]]:
    """The student's gradients, means over the batch, and both networks' new batch statistics."""
    run = partial(_passes, settings=settings)
    if settings.layout:
        run = spread_pass(run, settings.layout)
    shared = {
        "stats": (state.batch_stats, state.teacher_batch_stats),
        "center": state.center,
        "epoch": state.step // settings.steps_per_epoch,
        "teacher_temp": settings.teacher_temp(state.step),
    }
    return run((state.params, state.teacher_params), shared, batch)


def _passes(
    weights: tuple[PyTree, PyTree],
    shared: dict[str, PyTree],
    batch: Batch,
    *,
    settings: StepSettings,
) -> tuple[PyTree, _Means, tuple[PyTree, PyTree]]:
    """Forward and backward pass over some images, in one go or accumulated over micro-batches."""
    params, teacher_params = weights

    def one_pass(
        stats: tuple[PyTree, PyTree], batch: Batch
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, _Means]]:
        batch_stats, teacher_batch_stats = stats
        views, keys = settings.make_views(batch, shared["epoch"])
        teacher_logits, teacher_batch_stats = settings.network(
            teacher_params, teacher_batch_stats, views[:1]
        )

        def student_loss(params: PyTree) -> tuple[jax.Array, tuple[LossOutput, PyTree]]:
            logits, new_stats = settings.network(params, batch_stats, views, keys)
            output = dino_loss(
                logits,
                teacher_logits,
                shared["center"],
                student_temp=settings.student_temp,
                teacher_temp=shared["teacher_temp"],
            )
            return output.loss, (output, new_stats)

        (_, (loss, batch_stats)), grads = jax.value_and_grad(student_loss, has_aux=True)(params)
        return (batch_stats, teacher_batch_stats), (
            grads,
            _Means(loss, teacher_logits.mean((0, 1))),
        )

    steps = settings.accumulation_steps
    if steps == 1:
        stats, result = one_pass(shared["stats"], batch)
        return *result, stats

    def accumulate(
        carry: tuple[tuple[PyTree, PyTree], PyTree], micro_batch: Batch
    ) -> tuple[tuple[tuple[PyTree, PyTree], PyTree], None]:
        stats, total = carry
        stats, result = one_pass(stats, micro_batch)
        return (stats, jax.tree.map(lambda t, r: t + r / steps, total, result)), None

    # A micro-batch takes every steps-th image, so that it has the same ones on all device counts.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(lambda stats, batch: one_pass(stats, batch)[1], shared["stats"], first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (stats, result), _ = jax.lax.scan(accumulate, (shared["stats"], zeros), micro_batches)
    return *result, stats


def _reset(meters: Meters, step: jax.Array, settings: StepSettings) -> Meters:
    """Sets sums to zero if their interval or epoch begins with this step."""

    def clear(sums: PyTree, length: int) -> PyTree:
        begins = step % length == 0
        return jax.tree.map(lambda s: jnp.where(begins, jnp.zeros_like(s), s), sums)

    return Meters(
        interval=clear(meters.interval, settings.log_every),
        epoch=clear(meters.epoch, settings.steps_per_epoch),
    )


def compiler_options(platform: str) -> dict[str, str]:
    """XLA options that keep the barriers of `models.residual` until operations are fused.

    Empty for platforms and versions of JAX that need none: later versions may reject the option.
    """
    if platform == "cpu" and jax.__version_info__ < (0, 11):
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return {}
