"""Resolves the name of weights to a file, or to a folder of checkpoints."""

import os
from pathlib import Path

from dino_jax.errors import UsageError
from dino_jax.paths import local_path
from dino_jax.weights import hub
from dino_jax.weights.folders import explain


def find_file(weights: str | Path, kind: hub.Kind) -> Path | None:
    """The `.pth` file for a hub name or a path; None if the path is not a file.

    Args:
      weights: as in `load`.
      kind: which file of a hub name to use. It is downloaded if it is not cached.
    """
    if str(weights) in hub.RELEASED:
        return hub.fetch(str(weights), kind)
    path = local_path(weights, "weights")
    return path if os.path.isfile(path) else None


def full_or_backbone(weights: str) -> hub.Kind:
    """The kind of file to use for a hub name: "full" if a full checkpoint was released.

    The kind is ignored for paths.
    """
    released = hub.RELEASED.get(weights)
    return "full" if released is None or "full" in released.kinds else "backbone"


def folder_and_step(weights: str) -> tuple[Path, int | None]:
    """Splits WORKDIR@STEP. An existing folder with an @ in its name is not split.

    Raises:
      UsageError: the folder does not exist or is no run, or the step is not a number.
    """
    folder, at, step = weights.rpartition("@")
    if not at or local_path(weights, "weights").exists():
        folder, step = weights, ""
    if step and not step.isdecimal():
        raise UsageError(f"{weights!r}: the step after @ must be a whole number")
    path = local_path(folder, "weights")
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise UsageError(f"{folder!r} is a pipe or a device: give a file or a folder")
        raise UsageError(
            f"{folder!r} is neither a hub name ({', '.join(hub.RELEASED)}) nor an existing file or "
            "folder: give a hub name, a .pth file, a run's workdir or WORKDIR@STEP"
        )
    if explanation := explain(path):
        raise UsageError(f"{folder!r} is {explanation}")
    return path, int(step) if step else None
