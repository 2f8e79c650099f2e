"""DINO's optimizers, each as a single gradient transformation.

Learning rate, weight decay and the freezing of the last layer depend on the global step, so they
are arguments of `update`. The optimizer's own state counts only the steps in which a parameter was
not frozen.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dino_jax.errors import UsageError

PyTree = Any
Transformation = optax.GradientTransformationExtraArgs


def decay_mask(params: PyTree) -> PyTree:
    """True for every parameter with weight decay: those with more than one axis, so no biases."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def clip_by_parameter_norm(max_norm: float) -> Transformation:
    """Scales each parameter's gradient by min(1, max_norm / (its norm + 1e-6)).

    As in the reference, and unlike clipping by the global norm.
    """

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(1.0, max_norm / (optax.tree.norm(g) + 1e-6))

    return optax.with_extra_args_support(
        optax.stateless(lambda updates, params: jax.tree.map(clip, updates))
    )


def add_weight_decay() -> Transformation:
    """Adds `weight_decay` (an argument of `update`) times the parameter, given `decay_mask`."""

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        weight_decay: jax.Array,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        decayed = jax.tree.map(
            lambda g, p, decay: g + weight_decay * p if decay else g,
            updates,
            params,
            decay_mask(params),
        )
        return decayed, state

    return Transformation(optax.init_empty_state, update)


def scale_by_learning_rate() -> Transformation:
    """Multiplies by the negative `learning_rate` (an argument of `update`)."""

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        learning_rate: jax.Array,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return Transformation(optax.init_empty_state, update)


def hold_while_frozen(inner: Transformation) -> Transformation:
    """Makes no update and keeps the state while `frozen` (an argument of `update`) is true.

    Setting the gradients to zero would not be enough: moments and weights would still decay, and
    the step would be counted.
    """

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        frozen: jax.Array,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        new_updates, new_state = inner.update(updates, state, params, **extra)
        zeros = optax.tree.zeros_like(new_updates)
        return (
            optax.tree.where(frozen, zeros, new_updates),
            optax.tree.where(frozen, state, new_state),
        )

    return Transformation(inner.init, update)


def adamw() -> Transformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), betas 0.9 and 0.999, eps 1e-8."""
    return optax.chain(optax.scale_by_adam(), add_weight_decay(), scale_by_learning_rate())


def sgd() -> Transformation:
    """SGD with momentum 0.9; weight decay is added to the gradient before the momentum."""
    return optax.chain(add_weight_decay(), optax.trace(0.9), scale_by_learning_rate())


def lars() -> Transformation:
    """LARS (You et al., arXiv 1708.03888), momentum 0.9, eta 0.001; 1-D parameters use SGD."""
    scale = optax.scale_by_trust_ratio(trust_coefficient=0.001)
    return optax.chain(
        add_weight_decay(),
        optax.masked(scale, decay_mask),
        optax.trace(0.9),
        scale_by_learning_rate(),
    )


OPTIMIZERS: dict[str, Callable[[], Transformation]] = {"adamw": adamw, "sgd": sgd, "lars": lars}


def parameter_labels(params: PyTree, *, norm_last_layer: bool) -> PyTree:
    """The group of each parameter: "fixed", "last_layer" or "body"."""

    def label(path: tuple[Any, ...], _: jax.Array) -> str:
        names = [str(getattr(key, "key", key)) for key in path]
        if "last_layer" not in names:
            return "body"
        return "fixed" if names[-1] == "g" and norm_last_layer else "last_layer"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(name: str, *, clip_grad: float, norm_last_layer: bool) -> Transformation:
    """Gradient clipping, the optimizer, and the freezing of the last layer.

    Call it as `update(grads, state, params, learning_rate=, weight_decay=, frozen=)`, with the
    schedules' values for this step; while `frozen` is true, the last layer does not change.

    Args:
      name: a key of `OPTIMIZERS`.
      clip_grad: largest norm of each parameter's gradient; 0 disables clipping.
      norm_last_layer: keep the norms g of the prototypes at their initial value.
    Raises:
      UsageError: unknown optimizer.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    rule = OPTIMIZERS[name]
    groups = optax.partition(
        {"body": rule(), "last_layer": hold_while_frozen(rule()), "fixed": optax.set_to_zero()},
        lambda params: parameter_labels(params, norm_last_layer=norm_last_layer),
    )
    clip = clip_by_parameter_norm(clip_grad) if clip_grad else optax.identity()
    return optax.chain(clip, groups)
