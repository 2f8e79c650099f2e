"""Sorts the contents of the reference's `.pth` files: backbones, training states, linear heads."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_jax.errors import UsageError, about, listed
from dino_jax.weights.formats.pth.file import read_torch_file

Tensors = dict[str, np.ndarray]

# Components that torch's wrappers insert anywhere in a name.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Components before the names of a network, which may also name its role.
_PREFIX = re.compile(
    r"(?!momentum_encoder\.)(?:(?:model|net|network|backbone|vit)|"
    r"(?P<role>student|teacher|momentum|ema)(?:_(?:model|net|network|backbone|encoder|vit))?)\.|"
    r"(?P<head>student|teacher|momentum)_(?=head\.)"
)
_ROLES = {"student": "student", "teacher": "teacher", "momentum": "teacher", "ema": "teacher"}
# Keys under which other programs store a network, and whose it is if several occur together.
_CONTAINERS = {
    "state_dict": "student",
    "model_state_dict": "student",
    "model": "student",
    "net": "student",
    "network": "student",
    "backbone": "student",
    "state_dict_ema": "teacher",
    "teacher_state_dict": "teacher",
    "model_ema": "teacher",
    "ema": "teacher",
}
# A classifier on the features, a loss, or a count of averages: not part of the networks.
_UNUSED = re.compile(
    r"(?:head|head_dist|heads\.head|linear_head|fc|fc_norm|(?:\w+_)?classifier(?:\.\d+)?)\."
    r"(?:weight|bias)|(?:criterion|dino_loss|loss|loss_fn)\..+|n_averaged"
)
_PARTS = ("student", "teacher", "dino_loss", "epoch", "optimizer", "args")  # of a full checkpoint


@dataclasses.dataclass(frozen=True)
class TorchNetwork:
    """The tensors of a network, by their names in the part's own `state_dict()`."""

    backbone: Tensors
    head: Tensors  # empty if the network has no head


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """The contents of a file of the reference.

    A network without student and teacher is stored as the teacher, as the released backbones are
    teachers.
    """

    kind: Literal["backbone", "full", "linear"]
    networks: dict[str, TorchNetwork] = dataclasses.field(default_factory=dict)
    linear: Tensors = dataclasses.field(default_factory=dict)  # weight [C, F], bias [C]
    center: np.ndarray | None = None  # [1, K]
    epoch: int | None = None  # finished epochs
    optimizer: dict[str, Any] | None = None  # torch's state and param_groups
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # command-line arguments
    ignored: tuple[str, ...] = ()  # names of unused entries

    def network(self, which: str) -> TorchNetwork:
        """The student or the teacher.

        Raises:
          UsageError: the file does not contain it.
        """
        if which not in self.networks:
            contents = " and ".join(self.networks) or f"a {self.kind} head"
            raise UsageError(
                f"which={which!r} is not in this file, which contains {contents}: choose that, or "
                "give a full checkpoint"
            )
        return self.networks[which]


def read_torch_checkpoint(path: str | Path) -> TorchCheckpoint:
    """Reads a `.pth` file without torch, and sorts its contents.

    Containers of other programs are opened, and the prefixes that their wrappers add to names are
    removed.

    Args:
      path: the file.
    Raises:
      UsageError: the file cannot be read safely, or does not contain weights.
    """
    found = read_torch_file(path)
    with about(path):
        return _sort(found)


def _sort(found: Any) -> TorchCheckpoint:
    if not isinstance(found, dict):
        kind = "single tensor" if isinstance(found, np.ndarray) else type(found).__name__
        raise UsageError(
            f"it contains a {kind}, not weights by name: save a state dict, with "
            "torch.save(model.state_dict(), FILE)"
        )
    if "student" in found or "teacher" in found:
        return _full(found)
    networks, opened = _opened(found)
    if not networks:
        return _one({None: found}, {})
    return _one(networks, {key: value for key, value in found.items() if key not in opened})


def _opened(found: dict[str, Any]) -> tuple[dict[str | None, dict[str, Any]], set[str]]:
    """The networks in the containers of other programs, by role, and the keys of the containers.

    The role of a network without another one is None.
    """
    roles: dict[str | None, dict[str, Any]] = {}
    keys: set[str] = set()
    for key, role in _CONTAINERS.items():
        inner = found.get(key)
        if isinstance(inner, dict) and role not in roles:
            while deeper := next((k for k in _CONTAINERS if type(inner.get(k)) is dict), None):
                inner = inner[deeper]
            roles[role] = inner
            keys.add(key)
    if len(roles) == 1:
        roles = dict.fromkeys([None], *roles.values())
    return roles, keys


def _full(found: dict[str, Any]) -> TorchCheckpoint:
    networks, ignored = {}, []
    for which in ("student", "teacher"):
        if which in found:
            part = found[which]
            inner = _opened(part)[0].get(None, part) if isinstance(part, dict) else part
            networks[which], dropped = _network(_roles(_tensors(inner, which), which)[which])
            ignored += [f"{which}.{name}" for name in dropped]
    loss = _names_and_values(found, "dino_loss")
    optimizer = _names_and_values(found, "optimizer")
    with about("optimizer"):
        _names_and_values(optimizer or {}, "state")
    return TorchCheckpoint(
        kind="full",
        networks=networks,
        center=_tensors(loss, "dino_loss").get("center") if loss else None,
        epoch=_epoch(found),
        optimizer=optimizer,
        args=_names_and_values(found, "args") or {},
        ignored=(*ignored, *(str(name) for name in found if name not in _PARTS)),
    )


def _one(found: dict[str | None, dict[str, Any]], rest: dict[str, Any]) -> TorchCheckpoint:
    """One or two networks, or a linear head, and the names of the other entries in `rest`.

    Args:
      found: tensors by role; the role None contains what the names of its tensors say.
      rest: the other entries of the file.
    """
    epoch = _epoch(rest)
    unused = [str(name) for name in rest if name != "epoch"]
    roles: dict[str, Tensors] = {}
    for role, tensors in found.items():
        plain = {_WRAPPERS.sub("", name): x for name, x in _tensors(tensors, role or "it").items()}
        if plain.keys() == {"linear.weight", "linear.bias"}:
            linear = {name.removeprefix("linear."): tensor for name, tensor in plain.items()}
            _check_linear(**{name: tensor.shape for name, tensor in linear.items()})
            return TorchCheckpoint(kind="linear", linear=linear, epoch=epoch, ignored=tuple(unused))
        roles |= {role: tensors} if role else _roles(tensors)
    networks, ignored = {}, []
    for role in sorted(roles):
        networks[role], dropped = _network(roles[role])
        ignored += dropped
    return TorchCheckpoint(
        kind="backbone", networks=networks, epoch=epoch, ignored=(*ignored, *unused)
    )


def _plain(name: str) -> tuple[str, str | None]:
    """A tensor's name without wrappers and prefixes, and the role that these contain."""
    name, role = _WRAPPERS.sub("", name), None
    while found := _PREFIX.match(name):
        role = _ROLES.get(found["role"] or found["head"], role)
        name = name[found.end() :]
    return name, role


def _roles(tensors: Tensors, only: str | None = None) -> dict[str, Tensors]:
    """Splits tensors into student and teacher, if their names have these prefixes.

    Tensors without a role belong to the other network than those with one. A network alone is the
    teacher, unless its names contain the student only.

    Args:
      tensors: by their full names.
      only: the network they all belong to.
    """
    roles = [_plain(name)[1] for name in tensors]
    named = set(roles) - {None}
    other = only or ("student" if named == {"teacher"} and _has_backbone(tensors) else "teacher")
    networks: dict[str, Tensors] = {}
    for (name, tensor), role in zip(tensors.items(), roles, strict=True):
        networks.setdefault(only or role or other, {})[name] = tensor
    return networks


def _has_backbone(tensors: Tensors) -> bool:
    """Whether a backbone without a role is among the tensors."""
    return any(
        role is None and not name.startswith("head.") and not _UNUSED.fullmatch(name)
        for name, role in map(_plain, tensors)
    )


def _epoch(found: dict[str, Any]) -> int | None:
    epoch = found.get("epoch")
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise UsageError(f"epoch={epoch!r} must be a whole number of at least 0")
    return epoch


def _names_and_values(found: dict[str, Any], part: str) -> dict[str, Any] | None:
    value = found.get(part)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"its {part} must be a dict, not a {type(value).__name__}")
    return value


def _check_linear(weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    if len(weight) != 2 or bias != weight[:1]:
        raise UsageError(
            f"the weight has shape {list(weight)} and the bias {list(bias)}, but a linear "
            "classifier's have [classes, features] and [classes]"
        )


def _tensors(found: Any, part: str) -> Tensors:
    """Checks that `found` is a state dict, and returns it."""
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{part} contains no tensors: give a file with weights")
    foreign = [
        str(name)
        for name, value in found.items()
        if not isinstance(name, str) or not isinstance(value, np.ndarray)
    ]
    if foreign:
        raise UsageError(
            f"{part} contains more than tensors ({listed(foreign, limit=10)}): give a backbone, a "
            "full checkpoint of DINO (student, teacher, ...) or a linear head"
        )
    return found


def _network(tensors: Tensors) -> tuple[TorchNetwork, list[str]]:
    """Splits a network's tensors into backbone and head. Also returns the names of unused ones."""
    network, dropped = TorchNetwork({}, {}), []
    for name, tensor in tensors.items():
        plain, _ = _plain(name)
        if _UNUSED.fullmatch(plain):
            dropped.append(plain)
            continue
        is_head = plain.startswith("head.")
        part, plain = network.head if is_head else network.backbone, plain.removeprefix("head.")
        if plain in part:
            raise UsageError(f"{name} occurs twice, with and without a prefix")
        part[plain] = tensor
    if dropped:
        logging.warning(
            "left out tensors that are no part of the network (%s)", listed(dropped, limit=10)
        )
    for part in (network.backbone, network.head):
        for name in [name for name in part if name.endswith(".running_var")]:
            # Files from before torch 0.4.1 have no such count. Torch also starts at zero then.
            count = name.removesuffix("running_var") + "num_batches_tracked"
            part.setdefault(count, np.zeros((), np.int64))
    return network, dropped
