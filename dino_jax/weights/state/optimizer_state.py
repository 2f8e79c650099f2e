"""The state of a torch optimizer as ours: moments, and steps that each group took part in.

Torch numbers the trained parameters: first those that decay, then biases and 1-D ones, each in the
order of the modules; the norms of the prototypes are left out where they are fixed.
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
Name = tuple[str, str]  # of a parameter: backbone or head, and torch's name there

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_PROTOTYPES = "last_layer."  # they have a group of their own here, and thaw later
_NORMS = "last_layer.weight_g"
_MOMENTS = {  # torch's names by a key of `optim.OPTIMIZERS`; the order is that of our state
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lars": ("mu",),
}


def optimizer_state(
    found: dict[str, Any], student: TorchNetwork, start: optax.OptState, name: str
) -> optax.OptState:
    """Our optimizer's state with what torch's had come to.

    Parameters that took part in no step yet, as the last layer's while it is frozen, have no state
    in torch, and start.

    Args:
      found: torch's `state_dict()` of the optimizer: state and param_groups.
      student: the tensors that it trains.
      start: of `optim.make_optimizer(name, ...).init`; shapes are enough.
      name: a key of `optim.OPTIMIZERS`.
    Returns: a state of the same structure.
    Raises:
      UsageError: the state is of another optimizer or other parameters.
    """
    numbered = _numbered(student, fixed=norms_are_fixed(found, student))
    state = found.get("state") or {}
    groups = {
        "body": {i: n for i, n in numbered.items() if not n[1].startswith(_PROTOTYPES)},
        "last_layer": {i: n for i, n in numbered.items() if n[1].startswith(_PROTOTYPES)},
    }
    if not groups["last_layer"].keys() & state.keys():
        groups["last_layer"] = {}
    there = {i: n for group in groups.values() for i, n in group.items()}
    _check(state, there, student, _MOMENTS[name], name)
    moments = [
        _tree(student, {n: state[i][key] for i, n in there.items()}) for key in _MOMENTS[name]
    ]

    def filled(group: str, node: Any) -> Any:
        if isinstance(node, optax.TraceState):
            return node._replace(trace=_fill(node.trace, moments[0]))
        mu, nu = moments
        count = _steps(state, groups[group])
        return node._replace(count=count, mu=_fill(node.mu, mu), nu=_fill(node.nu, nu))

    return _replace(start, (optax.ScaleByAdamState, optax.TraceState), filled)


def norms_are_fixed(found: dict[str, Any], student: TorchNetwork) -> bool:
    """Whether the norms of the prototypes took no part in the optimizer.

    Raises:
      UsageError: the state is that of other parameters.
    """
    try:
        numbers = [number for group in found["param_groups"] for number in group["params"]]
    except (KeyError, TypeError) as error:
        raise UsageError("the optimizer's state has no param_groups, as torch's has") from error
    trained = len(_numbered(student, fixed=False))
    fixed = len(numbers) != trained
    if numbers != list(range(trained - fixed)) or (fixed and _NORMS not in student.head):
        raise UsageError(
            f"the optimizer's state is of {len(numbers)} parameters, the student has {trained}"
        )
    return fixed


def _numbered(student: TorchNetwork, *, fixed: bool) -> dict[int, Name]:
    """The trained parameters by torch's numbers."""
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
    there: dict[int, Name],
    student: TorchNetwork,
    keys: tuple[str, ...],
    optimizer: str,
) -> None:
    """Raises unless every parameter has its moments, in its shape."""

    def fits(entry: Any, name: Name) -> bool:
        shape = getattr(student, name[0])[name[1]].shape
        moments = [entry.get(key) for key in keys] if isinstance(entry, dict) else [None]
        return all(isinstance(x, np.ndarray) and x.shape == shape for x in moments)

    if lacking := [".".join(name) for i, name in there.items() if not fits(state.get(i), name)]:
        raise UsageError(
            f"the optimizer's state has no {' and '.join(keys)} of the shape of {len(lacking)} "
            f"parameters, such as {lacking[0]}: it is not that of {optimizer} for this network"
        )


def _tree(student: TorchNetwork, arrays: dict[Name, np.ndarray]) -> PyTree:
    """One moment of all parameters in our layout; zeros where there is none."""

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
    """The number of steps that a group took part in."""
    try:
        steps = {int(np.asarray(state[i]["step"])) for i in group} or {0}
        counts = np.array(sorted(steps), np.int32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError("the optimizer's state does not count its steps") from error
    if len(steps) != 1:
        raise UsageError(
            f"parameters of one group took part in different numbers of steps ({sorted(steps)}), "
            "which no run of DINO does"
        )
    return jnp.asarray(counts[0])


def _fill(slots: PyTree, values: PyTree) -> PyTree:
    """Values where a group has a slot; other groups' parameters are masked."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def filled(slot: Any, value: np.ndarray) -> Any:
        return slot if masked(slot) else jnp.array(value, slot.dtype)

    return jax.tree.map(filled, slots, values, is_leaf=masked)


def _replace(state: PyTree, kinds: tuple[type, ...], filled: Callable[[str, Any], Any]) -> PyTree:
    """A state with each node of these kinds replaced by `filled(group, node)`."""

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, kinds):
            return node
        group = next(key.key for key in path if getattr(key, "key", None) in ("body", "last_layer"))
        return filled(group, node)

    return jax.tree_util.tree_map_with_path(visit, state, is_leaf=lambda x: isinstance(x, kinds))
