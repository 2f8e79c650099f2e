"""Starts a new run from existing weights (`init_from`)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dino_jax.checkpoints import checkpoint
from dino_jax.config.build import model_spec
from dino_jax.config.spec import ModelSpec
from dino_jax.errors import UsageError, about, listed
from dino_jax.models.network import abstract
from dino_jax.training import optim
from dino_jax.training.state import TrainState, initializer
from dino_jax.weights.layouts.mapping import shape_problems
from dino_jax.weights.layouts.torch_checkpoint import TorchCheckpoint, read_torch_checkpoint
from dino_jax.weights.load import arrays_of, from_torch, read_folder
from dino_jax.weights.locate import find_file, full_or_backbone
from dino_jax.weights.state.optimizer_state import norms_are_fixed, optimizer_state

PyTree = Any


class Start(NamedTuple):
    """The initial state of a run, and notes on how it was made."""

    state: TrainState
    has_center: bool  # if false, the center must be computed with the teacher
    notes: list[str]  # sentences for the log


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The contents of existing weights that a run can start from."""

    weights: str  # as named in the config
    student: dict[str, PyTree] | None  # params, batch_stats
    teacher: dict[str, PyTree]
    num_heads: int | None  # for a ViT
    center: Any  # [1, K] for the weights' own K, or None
    # Maps the run's initial optimizer state to the stored one; UsageError if they do not match.
    opt_state: Callable[[PyTree], PyTree]


def read_initial(config: ConfigDict, spec: ModelSpec, shapes: TrainState) -> InitialWeights:
    """Reads the weights named by `config.init_from` into host memory.

    Args:
      config: the run's config; `init_from` is anything that `load` accepts. A hub name stands for
        its full checkpoint, if one was released.
      spec: the config's model.
      shapes: the run's abstract state.
    Raises:
      UsageError: the weights cannot be read, or contain a different backbone.
    """
    weights = config.init_from
    with about(f"init_from={weights}"):
        file = find_file(weights, full_or_backbone(weights))
        heads = _num_heads(spec)
        if file:
            found = _from_file(read_torch_checkpoint(file), config, heads)
        else:
            found = _from_folder(config)
        problems = shape_problems(found.teacher["params"]["backbone"], shapes.params["backbone"])
        if found.num_heads != heads:
            problems.append(f"num_heads is {found.num_heads}, not {heads}")
        if problems:
            raise UsageError(
                f"its backbone differs from the config's ({listed(problems, 10, '; ')}): set "
                "model.name, model.patch_size and model.overrides to the values that `python -m "
                "dino_jax inspect` prints"
            )
    return found


def start_from(found: InitialWeights, state: TrainState) -> Start:
    """Replaces the random weights of a new run.

    The backbone is always copied. If the head is missing or has other sizes, head, center and
    optimizer state keep their random initialization. A single network becomes both student and
    teacher.

    Args:
      found: the weights, from `read_initial`.
      state: the random state; the new arrays get its dtypes and shardings.
    """
    notes = [f"starting from {found.weights}"]
    student = found.student or found.teacher
    if found.student is None:
        notes.append("it contains one network, which becomes both student and teacher")
    head = found.teacher["params"].get("head")
    keeps_head = head is not None and not shape_problems(head, state.params["head"])
    if not keeps_head:
        what = "no head" if head is None else "a head of different sizes"
        notes.append(f"it has {what}: head, center and optimizer state are newly initialized")
    parts = ("backbone", "head") if keeps_head else ("backbone",)
    state = state.replace(
        params=_taken(state.params, student["params"], parts),
        batch_stats=_taken(state.batch_stats, student["batch_stats"], parts),
        teacher_params=_taken(state.teacher_params, found.teacher["params"], parts),
        teacher_batch_stats=_taken(state.teacher_batch_stats, found.teacher["batch_stats"], parts),
    )
    has_center = keeps_head and np.shape(found.center) == state.center.shape
    if has_center:
        state = state.replace(center=_placed(state.center, found.center))
    else:
        notes.append("the center is computed from the teacher's logits for the first batch")
    if keeps_head:
        try:
            state = state.replace(
                opt_state=_placed(state.opt_state, found.opt_state(state.opt_state))
            )
            notes.append("the optimizer state is restored")
        except UsageError as error:
            notes.append(f"the optimizer state is newly initialized: {error}")
    return Start(state, has_center, notes)


def _taken(start: PyTree, found: PyTree, parts: tuple[str, ...]) -> PyTree:
    return start | {part: _placed(start[part], found[part]) for part in parts if part in start}


def _placed(start: PyTree, found: PyTree) -> PyTree:
    """New arrays with the dtypes and shardings of `start`.

    Arrays are always copied, because student and teacher must not share buffers.
    """

    def placed(old: jax.Array, new: Any) -> jax.Array:
        return jax.device_put(np.array(new, old.dtype), old.sharding)

    return jax.tree.map(placed, start, found)


def _num_heads(spec: ModelSpec) -> int | None:
    """A ViT's number of attention heads, which no shape determines; None for other families."""
    return spec.sizes["num_heads"] if spec.family == "vit" else None


def _from_file(found: TorchCheckpoint, config: ConfigDict, heads: int | None) -> InitialWeights:
    if found.kind == "linear":
        raise UsageError("it is a linear classifier: give a backbone or a full checkpoint")
    student, teacher = (found.networks.get(which) for which in ("student", "teacher"))
    known, arrays = from_torch(teacher or student, num_heads=heads)

    def opt_state(start: PyTree) -> PyTree:
        if not found.optimizer or student is None:
            raise UsageError("the weights do not contain one")
        fixed = norms_are_fixed(found.optimizer, student)
        if config.head.weight_norm and fixed != config.head.norm_last_layer:
            raise UsageError("the stored one has a different head.norm_last_layer")
        return optimizer_state(found.optimizer, student, start, config.optim.name)

    own = student and arrays_of(student, known)
    return InitialWeights(config.init_from, own, arrays, heads, found.center, opt_state)


def _from_folder(config: ConfigDict) -> InitialWeights:
    def wanted(stored: ConfigDict, items: set[str]) -> dict[str, PyTree]:
        """The shapes of all items of the checkpoint, according to its own config."""
        if "training" not in items:
            _, params, batch_stats = abstract(model_spec(stored).model)
            return {"teacher": {"params": params, "batch_stats": batch_stats}}
        tx = optim.make_optimizer(
            stored.optim.name, clip_grad=0, norm_last_layer=stored.head.norm_last_layer
        )
        _, init = initializer(model_spec(stored).model, tx, num_prototypes=stored.head.out_dim)
        return checkpoint.to_items(jax.eval_shape(init, jax.random.key(0)))

    stored, items, _ = read_folder(config.init_from, wanted)
    items = jax.device_get(items)
    training = items.get("training", {})

    def opt_state(start: PyTree) -> PyTree:
        if not training:
            raise UsageError("the weights do not contain one")
        if jax.tree.structure(training["opt_state"]) != jax.tree.structure(start):
            raise UsageError("the stored one has a different optim.name or head.norm_last_layer")
        return training["opt_state"]

    center = training.get("center")
    return InitialWeights(
        config.init_from,
        items.get("student"),
        items["teacher"],
        _num_heads(model_spec(stored)),
        center,
        opt_state,
    )
