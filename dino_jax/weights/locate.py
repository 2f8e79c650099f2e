"""What the name of some weights stands for: a file, or a folder of checkpoints."""

import os
from pathlib import Path

from dino_jax.errors import UsageError
from dino_jax.weights import hub


def find_file(weights: str | Path, kind: hub.Kind) -> Path | None:
    """The `.pth` file behind a hub name or a path; None where there is no such file.

    Args:
      weights: as `load` takes it.
      kind: of a hub name, which of its files; it is downloaded if it is not on this machine.
    """
    if str(weights) in hub.RELEASED:
        return hub.fetch(str(weights), kind)
    path = Path(os.path.expanduser(weights))
    return path if os.path.isfile(path) else None


def full_or_backbone(weights: str) -> hub.Kind:
    """The most that there is of a hub name; other names do not mind."""
    released = hub.RELEASED.get(weights)
    return "full" if released is None or "full" in released.kinds else "backbone"


def folder_and_step(weights: str) -> tuple[Path, int | None]:
    """Splits WORKDIR@STEP; a folder whose own name holds an @ is itself.

    Raises:
      UsageError: there is no such folder, or the step is no number.
    """
    folder, at, step = weights.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(weights)):
        folder, step = weights, ""
    if step and not step.isdecimal():
        raise UsageError(f"{weights!r}: the step behind @ must be a whole number")
    path = Path(os.path.expanduser(folder))
    if not os.path.isdir(path):
        raise UsageError(
            f"{folder!r} is no hub name ({', '.join(hub.RELEASED)}), no file and no folder: give "
            "one of these names, a .pth file, or the folder of a run (its workdir) or WORKDIR@STEP"
        )
    return path, int(step) if step else None
