"""Files of linear classifiers: finished ones, and the state of a training."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.linear import Heads, Probe
from dino_jax.evaluate.features.cache import BROKEN_ARRAY, decisive
from dino_jax.output import whole_or_nothing
from dino_jax.weights import hub
from dino_jax.weights.load import load


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A linear classifier and its origin."""

    kernel: np.ndarray  # [F, C] float32
    bias: np.ndarray  # [C]
    weights: str | None = None  # SHA-256 of the backbone it was trained on
    feature: str | None = None  # the feature it classifies
    class_names: tuple[str, ...] | None = None

    @property
    def heads(self) -> Heads:
        """Wrapped as a batch of one classifier."""
        return Heads(self.kernel[None], self.bias[None])


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a training between two epochs."""

    probe: Probe
    best: LinearHead | None = None  # None before the first epoch
    best_record: dict[str, Any] = dataclasses.field(default_factory=dict)  # how it was chosen
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one record per epoch
    unreadable: frozenset[int] = frozenset()  # training images that were replaced


def write_head(path: Path, head: LinearHead) -> None:
    """Writes a classifier to an `.npz` file, atomically."""
    about = {"weights": head.weights, "feature": head.feature, "class_names": head.class_names}
    _write(path, about, {"kernel": head.kernel, "bias": head.bias})


def read_head(path: str) -> LinearHead:
    """Reads a classifier of this package or of the reference.

    Args:
      path: of an `.npz` or `.pth` file, or a hub name for the released classifier.
    Raises:
      UsageError: the file is missing, damaged, or no classifier.
    """
    if path in hub.RELEASED:
        path = str(hub.fetch(path, "linear"))
    if not path.endswith(".npz"):
        layer, *_ = load(path)
        if not isinstance(layer, nnx.Linear):
            raise UsageError(f"evaluate={path} is a backbone, not a linear classifier")
        return LinearHead(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...]))
    about, arrays = _read(
        Path(path),
        f"evaluate={path}",
        "use a head.npz, a .pth file or a hub name",
        about=("weights", "feature", "class_names"),
        names=("kernel", "bias"),
    )
    names = about.pop("class_names")
    return LinearHead(**arrays, **about, class_names=names and tuple(names))


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
    _write(path, about, dict(zip(names, map(np.asarray, arrays), strict=True)))


def read_progress(path: Path, settings: dict[str, Any]) -> Progress:
    """Reads the state of a training.

    Raises:
      UsageError: the file is damaged, or its settings differ.
    """
    about, arrays = _read(
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


def _write(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    try:
        with whole_or_nothing(path) as part, part.open("wb") as file:
            np.savez(file, about=json.dumps(about), **arrays)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from error


def _read(
    path: Path, what: str, way_out: str, *, about: tuple[str, ...], names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the named entries and arrays of a file that `_write` wrote."""
    try:
        # Opened here, so that broken files are closed. A single array is no context: TypeError.
        with path.open("rb") as opened, np.load(opened) as file:
            text = json.loads(str(file["about"]))
            return {name: text[name] for name in about}, {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise UsageError(f"{what}: the file does not exist") from error
    except (*BROKEN_ARRAY, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what} is damaged or not a file of this job: {way_out}") from error
