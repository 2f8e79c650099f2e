"""Says in words whether a run learns or collapses.

DINO can fail in two ways (Caron et al., 2021, section 5.3): every image gives the uniform
distribution (the teacher's entropy goes to ln K), or every image gives the same prototype (the
entropy goes to 0). In both the teacher says the same of every image, so the student has nothing to
learn and KL(teacher || student) goes to 0. Dims: K prototypes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dino_jax.training.state import TrainState


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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A finding, and what to do about it. Two of one kind say the same."""

    kind: str
    text: str


# Measured on runs with K = 256 (tests/training/test_health.py):
# ln(prototypes in use) / ln K was 0.86 or more in a healthy run, 0.3 to 0.7 under a teacher that
# copies the student, and below 0.1 after a collapse to one prototype. The center's change a step
# over its norm was 0.01 to 0.03 in the healthy run, 0.02 to 0.4 under the copying teacher.
# Information / ln K was 0.06 or more in the healthy run, and below 0.01 after a collapse to the
# uniform distribution.
ONE_PROTOTYPE = 0.15  # ln(prototypes in use) / ln K
FEW_PROTOTYPES = 0.7
RESTLESS_CENTER = 0.02  # change a step / norm
UNIFORM_ENTROPY = 0.98  # teacher entropy / ln K
LITTLE_INFORMATION = 0.02  # information / ln K
CENTER_STEPS = 100  # until the center has found its place


def assess(
    metrics: dict[str, float], *, num_prototypes: int, step: int, warmup_steps: int
) -> Verdict:
    """A verdict on an interval, with the setting to change.

    Args:
      metrics: as `summarize` gives them, as floats.
      num_prototypes: K.
      step: steps finished.
      warmup_steps: of the learning rate; until then little is learned anyhow.
    """
    log_k = math.log(num_prototypes) or 1.0
    used, information = metrics["prototypes_in_use"], metrics["information"]
    entropy = metrics["teacher_entropy_over_log_k"]
    if math.isnan(metrics["loss"]):
        return Verdict(
            "not finite",
            "no step of this interval was finite: lower optim.lr or optim.clip_grad, lengthen "
            "optim.warmup_epochs, or set model.dtype=float32",
        )
    if step < CENTER_STEPS:
        return Verdict("starting", "starting: too early to tell")
    if math.log(used) / log_k < ONE_PROTOTYPE:
        return Verdict(
            "one prototype",
            "COLLAPSED to one prototype: the teacher gives nearly every image the same; "
            f"{used:.1f} of {num_prototypes} are in use, KL(teacher || student) is "
            f"{metrics['kl']:.3f}. The center does not follow: lower loss.center_momentum (0.9 is "
            "usual); where it is 0.9, raise loss.teacher_temp",
        )
    if entropy > UNIFORM_ENTROPY and information / log_k < LITTLE_INFORMATION:
        if step < warmup_steps:
            return Verdict(
                "starting",
                "starting: the teacher still says the same of every image, as is usual while the "
                "learning rate rises",
            )
        return Verdict(
            "uniform",
            "COLLAPSED to the uniform distribution: the teacher says the same of every image "
            f"({information:.3f} nats tell two images apart; loss / ln K is "
            f"{metrics['loss_over_log_k']:.3f}). Lower loss.teacher_temp and "
            "loss.warmup_teacher_temp (0.04), raise optim.momentum_teacher, or raise "
            "optim.freeze_last_layer",
        )
    restless = metrics["center_change"] > RESTLESS_CENTER * metrics["center_norm"]
    if restless and math.log(used) / log_k < FEW_PROTOTYPES:
        return Verdict(
            "unstable",
            f"COLLAPSING: {used:.0f} of {num_prototypes} prototypes are in use, and which ones "
            "changes all the time: the teacher follows the student too closely. Raise "
            "optim.momentum_teacher (0.996; more for small batches), or lower optim.lr",
        )
    return Verdict("learning", f"learning: {used:.0f} of {num_prototypes} prototypes in use")
