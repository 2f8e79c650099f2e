"""Sorts the contents of the reference's `.pth` files: backbones, training states, linear heads."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_jax.errors import UsageError, about, listed
from dino_jax.weights.formats.pth.file import read_torch_file

Tensors = dict[str, np.ndarray]

_WRAPPERS = re.compile(r"^(module\.)+")  # prefixes added by torch's data parallelism
_NESTED = ("state_dict", "model")  # keys under which other programs store a network
_CLASSIFIER = ("fc.weight", "fc.bias")  # in torchvision's ResNets; not used by DINO
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

    Tensor names may start with `module.` and `backbone.`.

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
        raise UsageError(
            f"it contains a {type(found).__name__}, not weights by name: give a file with weights"
        )
    if "student" in found or "teacher" in found:
        return _full(found)
    for name in _NESTED:
        if isinstance(found.get(name), dict):
            rest = {key: value for key, value in found.items() if key != name}
            return _one(found[name], rest)
    return _one(found, {})


def _full(found: dict[str, Any]) -> TorchCheckpoint:
    networks, ignored = {}, []
    for which in ("student", "teacher"):
        if which in found:
            networks[which], dropped = _network(_tensors(found[which], which))
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


def _one(found: dict[str, Any], rest: dict[str, Any]) -> TorchCheckpoint:
    """A single network or linear head, and the names of the other entries in `rest`."""
    tensors, epoch = _tensors(found, "it"), _epoch(rest)
    unused = [str(name) for name in rest if name != "epoch"]
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(tensors) == 2 and plain.keys() == {"linear.weight", "linear.bias"}:
        linear = {name.removeprefix("linear."): tensor for name, tensor in plain.items()}
        _check_linear(**{name: tensor.shape for name, tensor in linear.items()})
        return TorchCheckpoint(kind="linear", linear=linear, epoch=epoch, ignored=tuple(unused))
    network, dropped = _network(tensors)
    return TorchCheckpoint(
        kind="backbone",
        networks={"teacher": network},
        epoch=epoch,
        ignored=(*dropped, *unused),
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
            f"{part} contains more than tensors ({listed(foreign)}): give a backbone, a full "
            "checkpoint of DINO (student, teacher, ...) or a linear head"
        )
    return found


def _network(tensors: Tensors) -> tuple[TorchNetwork, list[str]]:
    """Splits a network's tensors into backbone and head. Also returns the names of unused ones."""
    network = TorchNetwork({}, {})
    for name, tensor in tensors.items():
        plain = _WRAPPERS.sub("", name)
        if plain.startswith("head."):
            part, plain = network.head, plain.removeprefix("head.")
        else:
            part, plain = network.backbone, plain.removeprefix("backbone.")
        if plain in part:
            raise UsageError(f"{name} occurs twice, with and without a prefix")
        part[plain] = tensor
    for part in (network.backbone, network.head):
        for name in [name for name in part if name.endswith(".running_var")]:
            # Files from before torch 0.4.1 have no such count. Torch also starts at zero then.
            count = name.removesuffix("running_var") + "num_batches_tracked"
            part.setdefault(count, np.zeros((), np.int64))
    if "layer1.0.conv1.weight" not in network.backbone:
        return network, []
    return network, [n for n in _CLASSIFIER if network.backbone.pop(n, None) is not None]
