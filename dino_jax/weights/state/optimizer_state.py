"""Converts a torch optimizer's state to ours: the moments, and the step count of each group.

Torch identifies trained parameters by number: first those with weight decay, then biases and other
1-D parameters, each in the order of the modules. Fixed prototype norms have no number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dino_jax.errors import UsageError
from dino_jax.weights.layouts.architecture import family_of
from dino_jax.weights.layouts.mapping import to_ours
from dino_jax.weights.layouts.torch_checkpoint import Tensors, TorchNetwork

PyTree = Any
Name = tuple[str, str]  # of a parameter: "backbone" or "head", and torch's name in that part

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_PROTOTYPES = "last_layer."  # have their own group in our state, because they are frozen at first
_NORMS = "last_layer.weight_g"
_MOMENTS = {  # key of `optim.OPTIMIZERS`: torch's names of the moments, in the order of our state
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lars": ("mu",),
}


def optimizer_state(
    found: dict[str, Any], student: TorchNetwork, start: optax.OptState, name: str
) -> optax.OptState:
    """Fills our optimizer's state with the values of torch's.

    Parameters that were never updated, such as a frozen last layer, have no state in torch. They
    start from zero.

    Args:
      found: the `state_dict()` of torch's optimizer: state and param_groups.
      student: the tensors that it trains.
      start: the result of `optim.make_optimizer(name, ...).init`; may be abstract.
      name: a key of `optim.OPTIMIZERS`.
    Returns: a state with the structure of `start`.
    Raises:
      UsageError: the state belongs to another optimizer or other parameters.
    """
    numbered = _numbered(student, fixed=norms_are_fixed(found, student))
    state = found.get("state") or {}
    groups = {
        "body": {i: n for i, n in numbered.items() if not n[1].startswith(_PROTOTYPES)},
        "last_layer": {i: n for i, n in numbered.items() if n[1].startswith(_PROTOTYPES)},
    }
    if not groups["last_layer"].keys() & state.keys():
        groups["last_layer"] = {}
    stored = {i: n for group in groups.values() for i, n in group.items()}
    _check(state, stored, student, _MOMENTS[name], name)
    moments = [
        _tree(student, {n: state[i][key] for i, n in stored.items()}) for key in _MOMENTS[name]
    ]

    def filled(group: str, node: Any) -> Any:
        if isinstance(node, optax.TraceState):
            return node._replace(trace=_fill(node.trace, moments[0]))
        mu, nu = moments
        count = _steps(state, groups[group])
        return node._replace(count=count, mu=_fill(node.mu, mu), nu=_fill(node.nu, nu))

    return _replace(start, (optax.ScaleByAdamState, optax.TraceState), filled)


def norms_are_fixed(found: dict[str, Any], student: TorchNetwork) -> bool:
    """Whether the prototype norms were fixed, that is, not trained by the optimizer.

    Raises:
      UsageError: the state belongs to other parameters.
    """
    try:
        numbers = [number for group in found["param_groups"] for number in group["params"]]
    except (KeyError, TypeError) as error:
        raise UsageError("the optimizer state has no param_groups, so it is not torch's") from error
    trained = len(_numbered(student, fixed=False))
    fixed = len(numbers) != trained
    if numbers != list(range(trained - fixed)) or (fixed and _NORMS not in student.head):
        raise UsageError(
            f"the optimizer state has {len(numbers)} parameters, but the student has {trained}"
        )
    return fixed


def _numbered(student: TorchNetwork, *, fixed: bool) -> dict[int, Name]:
    """The names of the trained parameters by torch's numbers."""
    tensors = {
        (part, name): tensor
        for part, tensors in (("backbone", student.backbone), ("head", student.head))
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS) and not (fixed and name == _NORMS)
    }
    decayed = [name for name, tensor in tensors.items() if tensor.ndim > 1]
    others = [name for name, tensor in tensors.items() if tensor.ndim <= 1]
    return dict(enumerate(decayed + others))


def _check(
    state: dict[int, Any],
    stored: dict[int, Name],
    student: TorchNetwork,
    keys: tuple[str, ...],
    optimizer: str,
) -> None:
    """Raises UsageError unless every parameter has all moments, in its own shape."""

    def fits(entry: Any, name: Name) -> bool:
        shape = getattr(student, name[0])[name[1]].shape
        moments = [entry.get(key) for key in keys] if isinstance(entry, dict) else [None]
        return all(isinstance(x, np.ndarray) and x.shape == shape for x in moments)

    if lacking := [".".join(name) for i, name in stored.items() if not fits(state.get(i), name)]:
        raise UsageError(
            f"the optimizer state lacks {' and '.join(keys)}, in the right shape, for "
            f"{len(lacking)} parameters, such as {lacking[0]}: it does not belong to {optimizer} "
            "for this network"
        )


def _tree(student: TorchNetwork, arrays: dict[Name, np.ndarray]) -> PyTree:
    """A moment of all parameters in our layout; zeros for parameters without state."""

    def whole(part: str, tensors: Tensors) -> Tensors:
        zero = np.zeros((), np.float32)
        return {
            name: arrays.get((part, name), np.broadcast_to(zero, x.shape))
            for name, x in tensors.items()
        }

    backbone, _, _ = to_ours(whole("backbone", student.backbone), family_of(student.backbone))
    head, _, _ = to_ours(whole("head", student.head), "head")
    return {"backbone": backbone, "head": head}


def _steps(state: dict[int, Any], group: dict[int, Name]) -> jax.Array:
    """The number of steps in which a group was updated."""
    try:
        steps = {int(np.asarray(state[i]["step"])) for i in group} or {0}
        counts = np.array(sorted(steps), np.int32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError("the optimizer state has no valid step count") from error
    if len(steps) != 1:
        raise UsageError(
            f"parameters of one group have different step counts ({sorted(steps)}), which cannot "
            "happen in a DINO run"
        )
    return jnp.asarray(counts[0])


def _fill(slots: PyTree, values: PyTree) -> PyTree:
    """Fills a group's slots with values; the parameters of other groups stay masked."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def filled(slot: Any, value: np.ndarray) -> Any:
        return slot if masked(slot) else jnp.array(value, slot.dtype)

    return jax.tree.map(filled, slots, values, is_leaf=masked)


def _replace(state: PyTree, kinds: tuple[type, ...], filled: Callable[[str, Any], Any]) -> PyTree:
    """Replaces every node of these kinds by `filled(group, node)`."""

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, kinds):
            return node
        group = next(key.key for key in path if getattr(key, "key", None) in ("body", "last_layer"))
        return filled(group, node)

    return jax.tree_util.tree_map_with_path(visit, state, is_leaf=lambda x: isinstance(x, kinds))
