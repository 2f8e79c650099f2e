"""Checkpoints of a run: written by Orbax in the background, verified on every read.

A run folder contains `checkpoints/STEP/{student,teacher,training,about}`. Student and teacher are
`{params, batch_stats}`, so that an evaluation can read just one of them. `training` is the rest of
the state. `about` contains the resolved config, a checksum of every array, and its own checksum.
"""

import dataclasses
import logging
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from dino_jax.checkpoints import lock
from dino_jax.checkpoints.alias import plain_path
from dino_jax.checkpoints.damage import DamagedCheckpoint, differences, storage_status
from dino_jax.checkpoints.read import (
    FOLDER,
    checksums,
    metadata,
    read_about,
    read_items,
    text_checksum,
)
from dino_jax.errors import UsageError, listed
from dino_jax.training.state import TrainState

PyTree = Any


def to_items(state: TrainState) -> dict[str, PyTree]:
    """Splits a state into the items of a checkpoint."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    student = {name: fields.pop(name) for name in ("params", "batch_stats")}
    teacher = {name: fields.pop(f"teacher_{name}") for name in ("params", "batch_stats")}
    return {"student": student, "teacher": teacher, "training": fields}


def from_items(items: dict[str, PyTree]) -> TrainState:
    """The inverse of `to_items`."""
    teacher = {f"teacher_{name}": tree for name, tree in items["teacher"].items()}
    return TrainState(**items["student"], **teacher, **items["training"])


class RunCheckpoints:
    """The checkpoints of one run, as a context manager that locks the run's folder.

    Args:
      workdir: the run's folder.
      about: JSON-serialisable facts stored in every checkpoint, such as the config.
      keep_every_steps: checkpoints at multiples of this step are never deleted; 0 disables this.
    Raises:
      UsageError: the folder cannot be written, or another process is using it.
    """

    def __init__(self, workdir: Path, *, about: dict[str, Any], keep_every_steps: int) -> None:
        self._about = about
        self._folder = workdir / FOLDER
        self._verified = False
        self._saved: tuple[int, dict[str, PyTree]] | None = None  # the first: step, abstract items
        # Two, so that the run can resume even if the latest one is damaged.
        keep: list[managers.PreservationPolicy] = [managers.LatestN(2)]
        if keep_every_steps:
            keep.append(managers.EveryNSteps(keep_every_steps))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
            # Before the manager, which deletes what looks like leftovers of a killed run.
            self._lock = lock.take(workdir) if jax.process_index() == 0 else None
        except OSError as error:
            raise UsageError(
                f"workdir={workdir} cannot be written ({error.strerror}): choose another folder"
            ) from error
        self._manager = ocp.CheckpointManager(
            plain_path(self._folder.absolute()),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        try:
            with self._writing():
                self._manager.close()  # waits for a save in progress
            if error is None:
                self._verify_first()
        except UsageError as trouble:
            if error is None:
                raise
            logging.error("%s", trouble)  # must not hide the error that ends the run
        finally:
            if self._lock:
                self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A context that turns Orbax's write errors, also those of earlier saves, into ours."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not storage_status(error):
                raise
            reason = textwrap.shorten(str(error), 200)
            raise UsageError(
                f"a checkpoint cannot be written to {self._folder} ({reason}): check "
                "the free space there and run the same command again"
            ) from error

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background, unless already saved."""
        if step not in self._manager.all_steps():
            self.save_items(step, to_items(state))

    def save_items(self, step: int, items: dict[str, PyTree]) -> None:
        """Saves some of the items returned by `to_items`."""
        about = self._about | {"checksums": {name: checksums(tree) for name, tree in items.items()}}
        about["checksum"] = text_checksum(about)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**arrays, about=ocp.args.JsonSave(about))
        self.wait()  # verifies the first checkpoint before the second one is written
        plain_path(self._folder.absolute())  # restores a link that was removed
        with self._writing():
            self._manager.save(step, args=args, force=True)
        if not self._verified:
            self._saved = step, jax.eval_shape(lambda: items)

    def wait(self) -> None:
        """Waits until everything saved so far is on disk.

        Raises:
          UsageError: a checkpoint cannot be written, or the first one cannot be read back.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._verify_first()

    def _verify_first(self) -> None:
        """Reads back names, shapes and dtypes in the first checkpoint that this process wrote.

        A run must not continue if its checkpoints cannot be restored.
        """
        if self._verified or self._saved is None:
            return
        self._verified = True
        step, expected = self._saved
        try:
            problem = listed(differences(metadata(self._manager, step), expected), separator="; ")
        except DamagedCheckpoint as error:
            problem = str(error)
        if problem:
            raise UsageError(
                f"the checkpoint of step {step} was written to {self._folder} but cannot be read "
                f"back ({problem}), and later ones could not either: choose a workdir with another "
                "path, or on another file system"
            )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, including a save in progress; None without any."""
        return max(self._manager.all_steps(), default=None)

    def latest_about(self) -> dict[str, Any] | None:
        """The `about` item of the newest readable checkpoint; None without any."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return read_about(self._manager, step)
            except DamagedCheckpoint:
                continue  # `restore_latest` logs it
        return None

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """Restores the newest undamaged state, with the shardings of the abstract state.

        Damaged checkpoints that are newer than the restored one are deleted.

        Args:
          abstract_state: shapes, dtypes and shardings.
        Returns: the state, or None for a run without checkpoints.
        Raises:
          UsageError: all checkpoints are damaged, or the arrays have other shapes or dtypes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                state = from_items(read_items(self._manager, step, to_items(abstract_state)))
            except DamagedCheckpoint as error:
                problems.append(str(error))
                logging.warning("%s; trying the previous one", problems[-1])
                continue
            for broken in steps[: steps.index(step)]:
                self._manager.delete(broken)
            return state
        if problems:
            raise UsageError(
                f"none of the checkpoints in {self._folder} can be restored "
                f"({'; '.join(problems)}): restore the folder from a backup, or choose another "
                "workdir to start a new run"
            )
        return None
