"""One training step, in the order of the algorithm (Caron et al., 2021, algorithm 1).

Dims: B images, V views, K prototypes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dino_jax.losses import LossOutput, dino_loss, update_center
from dino_jax.models.network import Network
from dino_jax.models.residual import compiler_options
from dino_jax.schedules import Schedule
from dino_jax.sharding import PassLayout, constrain
from dino_jax.train_state import Meters, TrainState

PyTree = Any
Batch = dict[str, jax.Array]
# (batch, epoch) -> (global views [B, 2, ...], local views [B, L, ...]), one PRNG key an image
MakeViews = Callable[[Batch, jax.Array], tuple[tuple[jax.Array, ...], jax.Array | None]]

MAX_SKIPPED_IN_A_ROW = 3


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step needs to know besides its state and batch."""

    network: Network
    tx: optax.GradientTransformationExtraArgs
    make_views: MakeViews
    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule  # of the teacher
    teacher_temp: Schedule
    steps_per_epoch: int
    freeze_steps: int  # the last layer takes no part in the steps before this one
    student_temp: float = 0.1
    center_momentum: float = 0.9
    accumulation_steps: int = 1
    log_every: int = 1  # steps in a log interval
    layout: PassLayout | None = None  # None leaves it to XLA


@dataclasses.dataclass
class _Pass:
    """What one pass over a (micro-)batch gives; means over its images."""

    grads: PyTree
    loss: LossOutput
    teacher_logits: jax.Array  # [K]


jax.tree_util.register_dataclass(_Pass)


def compile_step(
    settings: StepSettings, state: TrainState, batch: Batch, shardings: TrainState
) -> Callable[[TrainState, Batch], TrainState]:
    """Traces and compiles the step once, for these shapes; it donates the state."""
    jitted = jax.jit(
        partial(train_step, settings=settings), donate_argnums=0, out_shardings=shardings
    )
    return jitted.lower(state, batch).compile(compiler_options=compiler_options())


def train_step(state: TrainState, batch: Batch, *, settings: StepSettings) -> TrainState:
    """Moves student, teacher and center by one batch; a step that is not finite changes nothing.

    Args:
      state: the state before the step.
      batch: arrays with leading axis B, as `settings.make_views` takes them.
      settings: networks, optimizer, schedules.
    Returns: the state after the step, its step counted whether it was finite or not.
    """
    step = state.step
    result, batch_stats, teacher_batch_stats = _forward_backward(state, batch, settings)
    grad_norm = optax.tree.norm(result.grads)

    updates, opt_state = settings.tx.update(
        result.grads,
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
    center = update_center(state.center, result.teacher_logits, settings.center_momentum)

    finite = jnp.isfinite(result.loss.loss) & jnp.isfinite(grad_norm)
    meters = _reset(state.meters, step, settings)
    measured = result.loss._asdict() | {
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
    # A run that is about to be stopped stays as its last good step left it.
    accept = finite & (state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW)
    chosen = jax.tree.map(lambda new, old: jnp.where(accept, new, old), after, before)
    return chosen.replace(
        step=step + 1,
        skipped_steps=state.skipped_steps + ~accept,
        skipped_in_a_row=jnp.where(accept, 0, state.skipped_in_a_row + 1),
    )


def _forward_backward(
    state: TrainState, batch: Batch, settings: StepSettings
) -> tuple[_Pass, PyTree, PyTree]:
    """Gradients, loss and teacher means of a batch, in one pass or accumulated over several.

    Returns: (means over the batch, the student's and the teacher's new running statistics).
    """
    epoch = state.step // settings.steps_per_epoch
    teacher_temp = settings.teacher_temp(state.step)
    layout = settings.layout or PassLayout()
    params, teacher_params = constrain((state.params, state.teacher_params), layout.weights)

    def one_pass(stats: tuple[PyTree, PyTree], batch: Batch) -> tuple[tuple[PyTree, PyTree], _Pass]:
        batch_stats, teacher_batch_stats = stats
        views, keys = settings.make_views(batch, epoch)
        teacher_logits, teacher_batch_stats = settings.network(
            teacher_params, teacher_batch_stats, views[:1]
        )

        def student_loss(params: PyTree) -> tuple[jax.Array, tuple[LossOutput, PyTree]]:
            logits, new_stats = settings.network(params, batch_stats, views, keys)
            output = dino_loss(
                logits,
                teacher_logits,
                state.center,
                student_temp=settings.student_temp,
                teacher_temp=teacher_temp,
            )
            return output.loss, (output, new_stats)

        (_, (loss, batch_stats)), grads = jax.value_and_grad(student_loss, has_aux=True)(params)
        grads = constrain(grads, layout.gradients)
        result = _Pass(grads, loss, teacher_logits.mean((0, 1)))
        return (batch_stats, teacher_batch_stats), result

    stats = state.batch_stats, state.teacher_batch_stats
    steps = settings.accumulation_steps
    if steps == 1:
        stats, result = one_pass(stats, batch)
        return result, *stats

    # Every steps-th image, so that each device splits its own share of the batch.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def accumulate(
        carry: tuple[tuple[PyTree, PyTree], _Pass], micro_batch: Batch
    ) -> tuple[tuple[tuple[PyTree, PyTree], _Pass], None]:
        stats, total = carry
        stats, result = one_pass(stats, micro_batch)
        return (stats, jax.tree.map(lambda t, r: t + r / steps, total, result)), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(lambda stats, batch: one_pass(stats, batch)[1], stats, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (stats, result), _ = jax.lax.scan(accumulate, (stats, zeros), micro_batches)
    return result, *stats


def _reset(meters: Meters, step: jax.Array, settings: StepSettings) -> Meters:
    """Empties the sums whose interval or epoch begins with this step."""

    def clear(sums: PyTree, length: int) -> PyTree:
        begins = step % length == 0
        return jax.tree.map(lambda s: jnp.where(begins, jnp.zeros_like(s), s), sums)

    return Meters(
        interval=clear(meters.interval, settings.log_every),
        epoch=clear(meters.epoch, settings.steps_per_epoch),
    )
