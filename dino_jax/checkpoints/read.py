"""Reads the checkpoints of a run, and verifies them on every read."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dino_jax.checkpoints.alias import plain_path
from dino_jax.checkpoints.damage import DamagedCheckpoint, differences, reading
from dino_jax.errors import UsageError, listed

PyTree = Any

FOLDER = "checkpoints"
ARRAY_ITEMS = ("student", "teacher", "training")
READ_ONLY = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)


@jax.jit
def _checksums(tree: PyTree) -> list[jax.Array]:
    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).ravel()
        # Weights that differ reveal swapped elements, and odd weights reveal every flipped bit.
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(tree)]


def checksums(tree: PyTree) -> list[int]:
    """A 32-bit checksum of every array in a tree, independent of the number of devices."""
    return [int(x) for x in jax.device_get(_checksums(tree))]


def text_checksum(about: dict[str, Any]) -> int:
    """A checksum of the `about` item, without the checksum itself."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def open_for_reading(workdir: Path) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run read-only.

    Raises:
      UsageError: there are no checkpoints.
    """
    folder = (workdir / FOLDER).absolute()
    if not folder.is_dir():
        raise UsageError(
            f"{workdir} contains no checkpoints: give the folder of a run (its workdir)"
        )
    manager = ocp.CheckpointManager(plain_path(folder), options=READ_ONLY)
    if not manager.all_steps():
        raise UsageError(f"{folder} contains no finished checkpoint yet: wait for the first one")
    return manager


def _folder(manager: ocp.CheckpointManager) -> Path:
    """The manager's folder for messages, without the link of `plain_path`."""
    return Path(manager.directory).resolve()


def choose(manager: ocp.CheckpointManager, step: int | None) -> int:
    """Returns the requested step, or the newest if `step` is None.

    Raises:
      UsageError: there is no checkpoint of that step.
    """
    steps = sorted(manager.all_steps())
    if step not in (None, *steps):
        raise UsageError(
            f"{_folder(manager).parent} has no checkpoint of step {step}: choose one of "
            f"{', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Reads the `about` item of a checkpoint: `config`, `num_images`, `checksums`.

    Raises:
      DamagedCheckpoint: it is incomplete or damaged.
      UsageError: it cannot be read at the moment.
    """
    return _read(manager, step, {})["about"]


def items_of(manager: ocp.CheckpointManager, step: int) -> set[str]:
    """The array items of a checkpoint; a converted backbone has no student."""
    folder = Path(manager.directory) / str(step)
    return {name for name in ARRAY_ITEMS if (folder / name).exists()}


def metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, PyTree]:
    """Names, shapes and dtypes of the arrays in every item of a checkpoint.

    Raises:
      DamagedCheckpoint: the checkpoint is incomplete or damaged.
      UsageError: it cannot be read at the moment.
    """
    folder, handler = Path(manager.directory) / str(step), ocp.StandardCheckpointHandler()
    there = items_of(manager, step)
    with reading(step):
        return {name: handler.metadata(folder / name).tree for name in ARRAY_ITEMS if name in there}


def read_items(
    manager: ocp.CheckpointManager, step: int, abstract_items: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Reads some of the items returned by `to_items`, with the shardings of the abstract items.

    Raises:
      DamagedCheckpoint: they are incomplete, or differ from what was saved.
      UsageError: they cannot be read at the moment, or have other names, shapes or dtypes.
    """
    stored = {name: x for name, x in metadata(manager, step).items() if name in abstract_items}
    if differing := differences(stored, {name: abstract_items[name] for name in stored}):
        problems = listed(differing, separator="; ")
        raise UsageError(
            f"the checkpoint of step {step} in {_folder(manager)} does not fit: {problems}; use "
            "the settings and the version of dino_jax that wrote it, or another workdir"
        )
    items = _read(manager, step, abstract_items)
    expected = items.pop("about")["checksums"]
    for name, tree in items.items():
        if checksums(tree) != expected[name]:
            raise DamagedCheckpoint(
                f"the checkpoint of step {step} is damaged: the checksum of {name} differs"
            )
    return items


def _read(
    manager: ocp.CheckpointManager, step: int, abstract_items: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Reads items of a checkpoint, and its `about`, whose checksum is verified."""
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
    args = ocp.args.Composite(**arrays, about=ocp.args.JsonRestore())
    with reading(step):
        items = dict(manager.restore(step, args=args))
        recorded = items["about"].pop("checksum")
    if recorded != text_checksum(items["about"]):
        raise DamagedCheckpoint(
            f"the checkpoint of step {step} is damaged: the checksum of its config differs"
        )
    return items
