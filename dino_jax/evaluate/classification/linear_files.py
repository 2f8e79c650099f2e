"""Files of linear classifiers: finished ones, and the state of a training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.linear import Heads, Probe
from dino_jax.evaluate.features.cache import decisive
from dino_jax.weights.linear import LinearHead, read_arrays, write_arrays


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a training between two epochs."""

    probe: Probe
    best: LinearHead | None = None  # None before the first epoch
    best_record: dict[str, Any] = dataclasses.field(default_factory=dict)  # how it was chosen
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one record per epoch
    unreadable: frozenset[int] = frozenset()  # training images that were replaced


def write_progress(path: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Writes the state of a training to an `.npz` file, atomically.

    Args:
      path: of the file.
      settings: must be the same when the training is resumed.
      progress: the state, after at least one epoch.
    """
    about = {
        "settings": settings,
        "best_record": progress.best_record,
        "history": progress.history,
        "unreadable": sorted(progress.unreadable),
        "best": dataclasses.asdict(
            dataclasses.replace(progress.best, kernel=None, bias=None)  # stored as arrays below
        ),
    }
    names = _progress_names()
    arrays = [*jax.tree.leaves(progress.probe), progress.best.kernel, progress.best.bias]
    write_arrays(path, about, dict(zip(names, map(np.asarray, arrays), strict=True)))


def read_progress(path: Path, settings: dict[str, Any]) -> Progress:
    """Reads the state of a training.

    Raises:
      UsageError: the file is damaged, or its settings differ.
    """
    about, arrays = read_arrays(
        path,
        f"workdir: {path}",
        "remove it to start again",
        about=("settings", "best_record", "history", "best", "unreadable"),
        names=_progress_names(),
    )
    different = [
        f"{name}={about['settings'].get(name)} (now {value})"
        for name, value in json.loads(json.dumps(settings)).items()
        if decisive(about["settings"].get(name)) != decisive(value)
    ]
    if different:
        raise UsageError(
            f"workdir={path.parent} contains a training with {', '.join(different)}: use another "
            "workdir, or the same settings to resume"
        )
    *probe, kernel, bias = arrays.values()
    about["best"] |= {"kernel": kernel, "bias": bias}
    if about["best"]["class_names"] is not None:
        about["best"]["class_names"] = tuple(about["best"]["class_names"])
    return Progress(
        Probe(Heads(*probe[:2]), Heads(*probe[2:])),
        LinearHead(**about["best"]),
        about["best_record"],
        about["history"],
        frozenset(about["unreadable"]),
    )


def _progress_names() -> tuple[str, ...]:
    trees = ("probe", "momentum")
    return (*(f"{tree}_{leaf}" for tree in trees for leaf in Heads._fields), "kernel", "bias")
