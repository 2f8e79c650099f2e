"""A new run that starts from weights: what they hold is taken, what they lack is said."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dino_jax.checkpoints import checkpoint
from dino_jax.config import build as settings
from dino_jax.errors import UsageError, about
from dino_jax.models.network import abstract
from dino_jax.training import optim
from dino_jax.training.state import TrainState, initializer
from dino_jax.weights.layouts.mapping import shape_problems
from dino_jax.weights.layouts.torch_checkpoint import TorchCheckpoint, read_torch_checkpoint
from dino_jax.weights.load import arrays_of, build, from_torch, read_folder
from dino_jax.weights.locate import find_file, full_if_released
from dino_jax.weights.state.optimizer_state import norms_are_fixed, optimizer_state

PyTree = Any


class Start(NamedTuple):
    """The first state of a run, and how it came about."""

    state: TrainState
    has_center: bool  # else it is still to be made from a teacher pass
    notes: list[str]  # a sentence each, for the log


@dataclasses.dataclass(frozen=True)
class Found:
    """What some weights hold for a run."""

    weights: str  # as the config calls them
    student: dict[str, PyTree] | None  # params, batch_stats
    teacher: dict[str, PyTree]
    num_heads: int | None  # of a ViT
    center: Any  # [1, K] of its own K, or None
    opt_state: Callable[[PyTree], PyTree]  # in a start's structure; UsageError where none fits


def find(config: ConfigDict, shapes: TrainState) -> Found:
    """Reads the weights of `config.init_from` into the host's memory.

    Args:
      config: of the run; `init_from` is anything that `load.load` takes; of a hub name it is the
        whole checkpoint, where that was released.
      shapes: of the run's state.
    Raises:
      UsageError: the weights cannot be read, or their backbone is another one.
    """
    weights = config.init_from
    with about(f"init_from={weights}"):
        file = find_file(weights, full_if_released(weights))
        found = _of_file(read_torch_checkpoint(file), config) if file else _of_folder(config)
        problems = shape_problems(found.teacher["params"]["backbone"], shapes.params["backbone"])
        if found.num_heads != (heads := _num_heads(config)):
            problems.append(f"num_heads is {found.num_heads}, not {heads}")
        if problems:
            raise UsageError(
                f"its backbone is not the config's ({'; '.join(problems[:5])}): set model.name, "
                "model.patch_size and model.overrides to what `python -m dino_jax inspect` says"
            )
    return found


def start_from(found: Found, state: TrainState) -> Start:
    """Replaces the random start of a run by weights.

    The backbone is taken. A head that is missing, or has other sizes than the run's, starts at
    random; then center and optimizer, which belong to a head, start anew as well. Where there is
    one network alone, it becomes both student and teacher.

    Args:
      found: by `find`.
      state: the random start; its arrays say where everything lies.
    """
    notes = [f"starts from {found.weights}"]
    student = found.student or found.teacher
    if found.student is None:
        notes.append("it holds one network, which becomes both student and teacher")
    head = found.teacher["params"].get("head")
    keeps_head = head is not None and not shape_problems(head, state.params["head"])
    if not keeps_head:
        what = "no head" if head is None else "a head of other sizes"
        notes.append(f"it has {what}: the head starts at random, center and optimizer anew")
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
        notes.append("the center is made from a teacher pass over the first batch")
    if keeps_head:
        try:
            state = state.replace(
                opt_state=_placed(state.opt_state, found.opt_state(state.opt_state))
            )
            notes.append("the optimizer's state is restored")
        except UsageError as error:
            notes.append(f"the optimizer starts anew: {error}")
    return Start(state, has_center, notes)


def _taken(start: PyTree, found: PyTree, parts: tuple[str, ...]) -> PyTree:
    return start | {part: _placed(start[part], found[part]) for part in parts if part in start}


def _placed(start: PyTree, found: PyTree) -> PyTree:
    """New arrays where the start's lie; a student and a teacher must not share theirs."""

    def placed(old: jax.Array, new: Any) -> jax.Array:
        return jax.device_put(np.array(new, old.dtype), old.sharding)  # which may keep that copy

    return jax.tree.map(placed, start, found)


def _num_heads(config: ConfigDict) -> int | None:
    """Attention heads of a ViT, which no shape tells; None of other backbones."""
    backbone = nnx.eval_shape(lambda: settings.build_backbone(config, nnx.Rngs(0)))
    return getattr(backbone, "num_heads", None)


def _of_file(found: TorchCheckpoint, config: ConfigDict) -> Found:
    if found.kind == "linear":
        raise UsageError("a linear classifier: give a backbone or a whole checkpoint")
    heads = _num_heads(config)
    student, teacher = (found.networks.get(which) for which in ("student", "teacher"))
    known, arrays = from_torch(teacher or student, num_heads=heads)

    def opt_state(start: PyTree) -> PyTree:
        if not found.optimizer or student is None:
            raise UsageError("it has none")
        fixed = norms_are_fixed(found.optimizer, student)
        if config.head.weight_norm and fixed != config.head.norm_last_layer:
            raise UsageError("its state is of another head.norm_last_layer")
        return optimizer_state(found.optimizer, student, start, config.optim.name)

    own = student and arrays_of(student, known)
    return Found(config.init_from, own, arrays, heads, found.center, opt_state)


def _of_folder(config: ConfigDict) -> Found:
    def wanted(there: ConfigDict, items: set[str]) -> dict[str, PyTree]:
        """All that the checkpoint holds, in the shapes of its own run."""
        if "training" not in items:
            _, params, batch_stats = abstract(partial(build, there))
            return {"teacher": {"params": params, "batch_stats": batch_stats}}
        tx = optim.make_optimizer(
            there.optim.name, clip_grad=0, norm_last_layer=there.head.norm_last_layer
        )
        _, init = initializer(partial(build, there), tx, num_prototypes=there.head.out_dim)
        return checkpoint.to_items(jax.eval_shape(init, jax.random.key(0)))

    there, items, _ = read_folder(config.init_from, wanted)
    items = jax.device_get(items)
    training = items.get("training", {})

    def opt_state(start: PyTree) -> PyTree:
        if not training:
            raise UsageError("it has none")
        if jax.tree.structure(training["opt_state"]) != jax.tree.structure(start):
            raise UsageError("its state is of another optim.name or head.norm_last_layer")
        return training["opt_state"]

    center = training.get("center")
    return Found(
        config.init_from,
        items.get("student"),
        items["teacher"],
        _num_heads(there),
        center,
        opt_state,
    )
