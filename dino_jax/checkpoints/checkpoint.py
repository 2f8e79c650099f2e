"""Checkpoints of a run: written by Orbax in the background, verified when read.

A run folder holds `checkpoints/STEP/{student,teacher,training,about}`. Student and teacher are
`{params, batch_stats}`, so that an evaluation reads one of them alone; `training` is the rest of
the state; `about` is the resolved config, a checksum of every array, and one of itself.
"""

import dataclasses
import json
import logging
import tempfile
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from dino_jax.checkpoints import lock
from dino_jax.checkpoints.damage import DamagedCheckpoint, reading, storage_status
from dino_jax.errors import UsageError
from dino_jax.training.state import TrainState

PyTree = Any

FOLDER = "checkpoints"
ARRAY_ITEMS = ("student", "teacher", "training")
READ_ONLY = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)


def to_items(state: TrainState) -> dict[str, PyTree]:
    """The state as the items of a checkpoint."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    student = {name: fields.pop(name) for name in ("params", "batch_stats")}
    teacher = {name: fields.pop(f"teacher_{name}") for name in ("params", "batch_stats")}
    return {"student": student, "teacher": teacher, "training": fields}


def from_items(items: dict[str, PyTree]) -> TrainState:
    """The inverse of `to_items`."""
    teacher = {f"teacher_{name}": tree for name, tree in items["teacher"].items()}
    return TrainState(**items["student"], **teacher, **items["training"])


@jax.jit
def _checksums(tree: PyTree) -> list[jax.Array]:
    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).ravel()
        # The weights make a swap of two elements show, the odd factor every flipped bit.
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(tree)]


def checksums(tree: PyTree) -> list[int]:
    """A 32-bit checksum of every array of a tree, the same on any number of devices."""
    return [int(x) for x in jax.device_get(_checksums(tree))]


def _text_checksum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


class RunCheckpoints:
    """The checkpoints of one run, whose folder is locked meanwhile; use as a context manager.

    Args:
      workdir: the run's folder.
      about: JSON-able facts stored in every checkpoint, such as the config.
      keep_every_steps: checkpoints at multiples of this step are kept for good; 0 for none.
    Raises:
      UsageError: the folder cannot be written, or another process is at work in it.
    """

    def __init__(self, workdir: Path, *, about: dict[str, Any], keep_every_steps: int) -> None:
        self._about = about
        # Two, so that a damaged latest one does not end the run.
        keep: list[managers.PreservationPolicy] = [managers.LatestN(2)]
        if keep_every_steps:
            keep.append(managers.EveryNSteps(keep_every_steps))
        try:
            (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=workdir / FOLDER).close()
            # Before the manager, which removes what looks like the rest of a killed run.
            self._lock = lock.take(workdir) if jax.process_index() == 0 else None
        except OSError as error:
            raise UsageError(
                f"workdir={workdir} cannot be written ({error.strerror}): choose another folder"
            ) from error
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        try:
            with self._written():
                self._manager.close()  # waits for a save that is under way
        except UsageError as trouble:
            if error is None:
                raise
            logging.error("%s", trouble)  # must not hide why the run ends
        finally:
            if self._lock:
                self._lock.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Says in a sentence that what Orbax writes meanwhile, or wrote before, cannot be."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not storage_status(error):
                raise
            reason = textwrap.shorten(str(error), 200)
            raise UsageError(
                f"a checkpoint cannot be written to {self._manager.directory} ({reason}): see to "
                "the space there and run the same command"
            ) from error

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; once a step."""
        if step not in self._manager.all_steps():
            self.save_items(step, to_items(state))

    def save_items(self, step: int, items: dict[str, PyTree]) -> None:
        """As `save`, of some of the items that `to_items` gives."""
        about = self._about | {"checksums": {name: checksums(tree) for name, tree in items.items()}}
        about["checksum"] = _text_checksum(about)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**arrays, about=ocp.args.JsonSave(about))
        with self._written():
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with self._written():
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, one under way included; None where there is none."""
        return max(self._manager.all_steps(), default=None)

    def latest_about(self) -> dict[str, Any] | None:
        """What the newest readable checkpoint says about the run; None where there is none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return read_about(self._manager, step)
            except DamagedCheckpoint:
                continue  # `restore_latest` says so
        return None

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """The newest state that is whole, laid out as the abstract state's shardings say.

        Args:
          abstract_state: shapes, dtypes and shardings.
        Returns: the state, or None for a run without checkpoints.
        Raises:
          UsageError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                state = from_items(read_items(self._manager, step, to_items(abstract_state)))
            except DamagedCheckpoint as error:
                problems.append(str(error))
                logging.warning("%s; trying the one before", problems[-1])
                continue
            for broken in steps[: steps.index(step)]:
                self._manager.delete(broken)
            return state
        if problems:
            raise UsageError(
                f"none of the checkpoints in {self._manager.directory} can be read "
                f"({'; '.join(problems)}): choose another workdir, or remove them to start anew"
            )
        return None


def open_for_reading(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, to read only.

    Raises:
      UsageError: no checkpoint there.
    """
    folder = (workdir / FOLDER).absolute()
    if not folder.is_dir():
        raise UsageError(f"{workdir} holds no checkpoints: give the folder of a run (its workdir)")
    manager = ocp.CheckpointManager(folder, options=READ_ONLY)
    if not manager.all_steps():
        raise UsageError(f"{folder} holds no finished checkpoint yet: wait for the first one")
    return manager


def choose(manager: ocp.CheckpointManager, step: int | None) -> int:
    """The step that is asked for, or the newest.

    Raises:
      UsageError: there is none of that step.
    """
    steps = sorted(manager.all_steps())
    if step not in (None, *steps):
        raise UsageError(
            f"{Path(manager.directory).parent} has no checkpoint of step {step}: choose one of "
            f"{', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself: `config`, `num_images`, `checksums`.

    Raises:
      DamagedCheckpoint: it is not whole.
      UsageError: it cannot be read now.
    """
    return _read(manager, step, {})["about"]


def items_of(manager: ocp.CheckpointManager, step: int) -> set[str]:
    """The items that a checkpoint holds; one of a backbone alone has no student."""
    folder = Path(manager.directory) / str(step)
    return {name for name in ARRAY_ITEMS if (folder / name).exists()}


def metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, PyTree]:
    """Names, shapes and dtypes of the arrays of every item of a checkpoint.

    Raises:
      DamagedCheckpoint: they are not whole.
      UsageError: they cannot be read now.
    """
    folder, handler = Path(manager.directory) / str(step), ocp.StandardCheckpointHandler()
    there = items_of(manager, step)
    with reading(step):
        return {name: handler.metadata(folder / name).tree for name in ARRAY_ITEMS if name in there}


def read_items(
    manager: ocp.CheckpointManager, step: int, abstract_items: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Some of the items that `to_items` gives, laid out as the abstract ones say.

    Raises:
      DamagedCheckpoint: they are not whole, or not what was saved.
      UsageError: they cannot be read now.
    """
    items = _read(manager, step, abstract_items)
    expected = items.pop("about")["checksums"]
    for name, tree in items.items():
        if checksums(tree) != expected[name]:
            raise DamagedCheckpoint(f"checkpoint of step {step} is damaged: {name} has changed")
    return items


def _read(
    manager: ocp.CheckpointManager, step: int, abstract_items: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Items of a checkpoint, and its `about`, which is verified."""
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
    args = ocp.args.Composite(**arrays, about=ocp.args.JsonRestore())
    with reading(step):
        items = dict(manager.restore(step, args=args))
        recorded = items["about"].pop("checksum")
    if recorded != _text_checksum(items["about"]):
        raise DamagedCheckpoint(f"checkpoint of step {step} is damaged: its config has changed")
    return items
