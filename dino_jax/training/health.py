"""Detects whether a run is learning or collapsing, and explains it in words.

DINO can collapse in two ways (Caron et al., 2021, section 5.3): the teacher's output becomes
uniform (its entropy approaches ln K), or one prototype dominates (the entropy approaches 0). In
both cases the teacher's output is the same for all images, so the student has nothing to learn and
KL(teacher || student) approaches 0.

Dims: K prototypes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dino_jax.training.state import TrainState


@jax.jit
def summarize(state: TrainState) -> dict[str, jax.Array]:
    """Means over the current log interval, and the epoch's mean loss so far; all are scalars.

    If every step of the interval was skipped, the means are NaN.
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
        # Mutual information of image and prototype, in nats.
        "information": mean_entropy - mean["teacher_entropy"],
        "prototypes_in_use": jnp.exp(mean_entropy),
        "center_norm": jnp.linalg.norm(state.center),
        "center_change": mean["center_change"],
        "grad_norm": mean["grad_norm"],
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "epoch_loss": state.meters.epoch["loss"] / state.meters.epoch["steps"],
    }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A diagnosis of the run."""

    kind: str  # equal for equal diagnoses, whatever numbers the text contains
    text: str  # the diagnosis, and which setting to change


# Thresholds, from runs with K = 256 (tests/training/test_health.py).
# ln(prototypes in use) / ln K was at least 0.86 in a healthy run, 0.3 to 0.7 if the teacher copies
# the student, and below 0.1 after a collapse to one prototype. The change of the center per step,
# divided by its norm, was 0.01 to 0.03 in the healthy run and 0.02 to 0.4 with the copying teacher.
# Information / ln K was at least 0.06 in the healthy run and below 0.01 after a collapse to the
# uniform distribution.
ONE_PROTOTYPE = 0.15  # ln(prototypes in use) / ln K
FEW_PROTOTYPES = 0.7  # likewise
RESTLESS_CENTER = 0.02  # change per step / norm
UNIFORM_ENTROPY = 0.98  # teacher entropy / ln K
LITTLE_INFORMATION = 0.02  # information / ln K
CENTER_STEPS = 100  # steps until the center has settled


def assess(
    metrics: dict[str, float], *, num_prototypes: int, step: int, warmup_steps: int
) -> Verdict:
    """Diagnoses a log interval, and names the setting to change if the run collapses.

    Args:
      metrics: the metrics of `summarize`, as floats.
      num_prototypes: K.
      step: number of finished steps.
      warmup_steps: length of the learning rate's warm-up, during which little is learned.
    """
    log_k = math.log(num_prototypes) or 1.0
    used, information = metrics["prototypes_in_use"], metrics["information"]
    entropy = metrics["teacher_entropy_over_log_k"]
    if math.isnan(metrics["loss"]):
        return Verdict(
            "not finite",
            "every step of this interval had a non-finite loss or gradient: lower optim.lr or "
            "optim.clip_grad, raise optim.warmup_epochs, or set model.dtype=float32",
        )
    if step < CENTER_STEPS:
        return Verdict("starting", "starting: too early to tell")
    if math.log(used) / log_k < ONE_PROTOTYPE:
        return Verdict(
            "one prototype",
            "COLLAPSED to one prototype: the teacher assigns nearly every image to the same one; "
            f"{used:.1f} of {num_prototypes} are in use, KL(teacher || student) is "
            f"{metrics['kl']:.3f}. The center lags behind: lower loss.center_momentum (default "
            "0.9); if it is 0.9 already, raise loss.teacher_temp",
        )
    if entropy > UNIFORM_ENTROPY and information / log_k < LITTLE_INFORMATION:
        if step < warmup_steps:
            return Verdict(
                "starting",
                "starting: the teacher's output is still the same for all images, as is usual "
                "during the learning rate's warm-up",
            )
        return Verdict(
            "uniform",
            "COLLAPSED to the uniform distribution: the teacher's output is the same for all "
            f"images (it has {information:.3f} nats of information about the image; loss / ln K is "
            f"{metrics['loss_over_log_k']:.3f}). Lower loss.teacher_temp and "
            "loss.warmup_teacher_temp (default 0.04), raise optim.momentum_teacher, or raise "
            "optim.freeze_last_layer",
        )
    restless = metrics["center_change"] > RESTLESS_CENTER * metrics["center_norm"]
    if restless and math.log(used) / log_k < FEW_PROTOTYPES:
        return Verdict(
            "unstable",
            f"COLLAPSING: only {used:.0f} of {num_prototypes} prototypes are in use, and they "
            "change all the time: the teacher follows the student too closely. Raise "
            "optim.momentum_teacher (default 0.996; more for small batches), or lower optim.lr",
        )
    return Verdict("learning", f"learning: {used:.0f} of {num_prototypes} prototypes in use")
