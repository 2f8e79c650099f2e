"""The optimizers of DINO as one gradient transformation.

Learning rate, weight decay and the freeze of the last layer follow the global step, so they are
arguments of `update`; the optimizer's own state counts the steps that a parameter took part in.
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
    """True for every parameter that weight decay applies to: neither a bias nor 1-D."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def clip_by_parameter_norm(max_norm: float) -> Transformation:
    """Scales each parameter's gradient by min(1, max_norm / (its norm + 1e-6)).

    This is the reference's clipping, and not that by the global norm.
    """

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(1.0, max_norm / (optax.tree.norm(g) + 1e-6))

    return optax.with_extra_args_support(
        optax.stateless(lambda updates, params: jax.tree.map(clip, updates))
    )


def add_weight_decay() -> Transformation:
    """Adds `weight_decay` (an argument of `update`) times the parameter, where the mask holds."""

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
    """Multiplies by minus the `learning_rate` given to `update`."""

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
    """Stands still, state included, while the `frozen` given to `update` is true.

    Zeroed gradients are another thing: they would decay moments and weights and count as steps.
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
    """SGD with momentum 0.9; the decay joins the gradient before the momentum."""
    return optax.chain(add_weight_decay(), optax.trace(0.9), scale_by_learning_rate())


def lars() -> Transformation:
    """LARS (You et al., arXiv 1708.03888), momentum 0.9, eta 0.001; not on 1-D tensors."""
    scale = optax.scale_by_trust_ratio(trust_coefficient=0.001)
    return optax.chain(
        add_weight_decay(),
        optax.masked(scale, decay_mask),
        optax.trace(0.9),
        scale_by_learning_rate(),
    )


OPTIMIZERS: dict[str, Callable[[], Transformation]] = {"adamw": adamw, "sgd": sgd, "lars": lars}


def parameter_labels(params: PyTree, *, norm_last_layer: bool) -> PyTree:
    """Names the group of each parameter: "fixed", "last_layer" or "body"."""

    def label(path: tuple[Any, ...], _: jax.Array) -> str:
        names = [str(getattr(key, "key", key)) for key in path]
        if "last_layer" not in names:
            return "body"
        return "fixed" if names[-1] == "g" and norm_last_layer else "last_layer"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(name: str, *, clip_grad: float, norm_last_layer: bool) -> Transformation:
    """Clipping, the optimizer proper, and the freeze of the last layer.

    `update(grads, state, params, learning_rate=, weight_decay=, frozen=)` takes this step's values
    of the schedules; `frozen` is true while the last layer takes no part in the step.

    Args:
      name: a key of `OPTIMIZERS`.
      clip_grad: largest norm of one parameter's gradient; 0 for no clipping.
      norm_last_layer: keep the norms g of the prototypes at their initial value.
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
