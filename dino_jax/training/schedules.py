"""Schedules as functions of the step (Caron et al., 2021, section 3.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def cosine(base: float, final: float, *, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0 to `base`, then half a cosine to `final`.

    The last warm-up step and the first step of the cosine both have the value `base`. The cosine
    would reach `final` at step `total_steps`, one after the last. A warm-up of a single step has
    the value 0.

    Args:
      base: value after the warm-up.
      final: value that the cosine approaches.
      total_steps: length of the whole schedule, including the warm-up.
      warmup_steps: length of the warm-up, at most `total_steps`.
    Returns: a function of the step, an integer array of any shape.
    """
    cosine_steps = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, float)  # float64 if x64 is enabled
        rising = base * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / cosine_steps
        falling = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, rising, falling)

    return schedule


def teacher_temperature(
    warmup: float, final: float, *, warmup_epochs: int, steps_per_epoch: int
) -> Schedule:
    """The teacher's temperature: linear from `warmup` to `final`, constant within each epoch.

    The first warm-up epoch has the value `warmup` and the last has `final`, as do all later ones.
    """

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step // steps_per_epoch, float)
        rising = warmup + (final - warmup) * epoch / max(warmup_epochs - 1, 1)
        return jnp.where(epoch < warmup_epochs, rising, final)

    return schedule
