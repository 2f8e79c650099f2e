"""Prints the contents of a checkpoint as a table."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
from tyro.conf import Positional

from dino_jax.checkpoints.damage import DamagedCheckpoint
from dino_jax.config.build import flatten
from dino_jax.errors import UsageError, listed
from dino_jax.jobs.results import table
from dino_jax.weights.layouts.architecture import infer
from dino_jax.weights.layouts.torch_checkpoint import TorchCheckpoint, read_torch_checkpoint
from dino_jax.weights.locate import find_file, folder_and_step

Rows = list[tuple[str, object]]

_KINDS = {
    "backbone": "network",
    "full": "full training state",
    "linear": "linear classifier",
}


def inspect(
    file: Positional[str],
    what: Literal["backbone", "full", "linear"] = "backbone",
    tensors: bool = False,
) -> None:
    """Prints what a checkpoint contains: kind, architecture, epoch, tensors, sizes, settings.

    Args:
      file: A .pth file, a hub name, a converted folder, a run's folder, or RUN@STEP.
      what: Which file of a hub name to read; "full" includes the training settings.
      tensors: List every tensor with its shape and dtype.

    Raises:
      UsageError: the checkpoint does not exist or cannot be read.
    """
    path = find_file(file, what)
    rows, arrays = _folder(file) if path is None else _torch(path)
    print(table(["what", "value"], [row for row in rows if row[1] is not None], align="<"))
    if tensors:
        print()
        lines = [[name, "x".join(map(str, x.shape)) or "-", x.dtype] for name, x in arrays.items()]
        print(table(["tensor", "shape", "dtype"], lines, align="<"))


def _torch(path: Path) -> tuple[Rows, dict[str, Any]]:
    found = read_torch_checkpoint(path)
    arrays = {f"linear.{name}": x for name, x in found.linear.items()}
    for which, network in found.networks.items():
        parts = {"backbone": network.backbone, "head": network.head}
        arrays |= {f"{which}.{p}.{n}": x for p, part in parts.items() for n, x in part.items()}
    rows: Rows = [("file", path), ("format", "torch"), ("kind", _KINDS[found.kind])]
    rows += _architecture(found)
    rows += [("epoch", found.epoch), ("center", None if found.center is None else "yes")]
    if found.optimizer is not None:
        rows.append(("optimizer", f"state of {len(found.optimizer.get('state') or {})} parameters"))
    if found.ignored:
        rows.append(("ignored", listed(found.ignored, limit=10)))
    rows += _sizes(arrays.values())
    return rows + [(f"args.{name}", value) for name, value in found.args.items()], arrays


def _architecture(found: TorchCheckpoint) -> Rows:
    if found.kind == "linear":
        classes, width = found.linear["weight"].shape
        return [("classes", classes), ("features", width)]
    try:
        spec = infer(found.networks.get("teacher") or found.networks["student"])
    except UsageError as error:  # the other rows are still useful
        return [("networks", ", ".join(found.networks)), ("architecture", f"unknown: {error}")]
    head = dataclasses.asdict(spec.head) if spec.head else {}
    return [
        ("networks", ", ".join(found.networks)),
        ("architecture", spec.arch),
        ("patch size", spec.patch_size),
        *spec.overrides.items(),
        *((f"head.{name}", value) for name, value in head.items()),
    ]


def _folder(name: str) -> tuple[Rows, dict[str, Any]]:
    from dino_jax.checkpoints import read  # here, because Orbax is slow to import

    folder, step = folder_and_step(name)
    manager = read.open_for_reading(folder)
    try:
        steps = sorted(manager.all_steps())
        step = read.choose(manager, step)
        about = read.read_about(manager, step)
        metadata = read.metadata(manager, step)
    except DamagedCheckpoint as error:
        raise UsageError(f"{folder}: {error}") from error
    finally:
        manager.close()
    arrays = {
        f"{item}.{'.'.join(_key(k) for k in path)}": leaf
        for item, tree in metadata.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    converted, config = about.get("converted"), about["config"]
    rows: Rows = [
        ("folder", folder),
        ("format", "orbax"),
        ("kind", "converted" if converted else "run"),
        ("steps", ", ".join(map(str, steps))),
        ("shown step", step),
        ("items", ", ".join(metadata)),
        ("architecture", config["model"]["name"]),
        ("images", about["num_images"]),
    ]
    rows += [(f"converted.{key}", value) for key, value in flatten(converted or {}).items()]
    rows += _sizes(arrays.values())
    return rows + list(flatten(config).items()), arrays


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _sizes(arrays: Iterable[Any]) -> Rows:
    arrays = list(arrays)
    numbers = [math.prod(x.shape) for x in arrays]
    size = sum(n * x.dtype.itemsize for n, x in zip(numbers, arrays, strict=True))
    return [("tensors", len(arrays)), ("numbers", sum(numbers)), ("MiB", f"{size / 2**20:.1f}")]
