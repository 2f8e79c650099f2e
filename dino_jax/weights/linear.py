"""Reads and writes linear classifiers: ours (`head.npz`) and the reference's (`.pth`)."""

import dataclasses
import json
import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models.network import abstract
from dino_jax.output import whole_or_nothing
from dino_jax.paths import local_path
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.locate import find_file

# Exceptions that `np.load` and reading its arrays raise for damaged files. A long header of an .npy
# file is parsed as Python.
BROKEN_ARRAY = (OSError, TypeError, ValueError, EOFError, SyntaxError, TokenError)


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A linear classifier's arrays, and the features that it was trained on."""

    kernel: np.ndarray  # [F, C] float32
    bias: np.ndarray  # [C] float32
    weights: str | None = None  # SHA-256 of the backbone; None for the reference's classifiers
    feature: str | None = None  # which feature of the backbone
    class_names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class LinearInfo:
    """Facts about a loaded linear classifier."""

    source: str  # as passed to `load_linear`
    in_features: int  # F
    num_classes: int  # C
    weights: str | None  # SHA-256 of the backbone it was trained on, if known
    feature: str | None  # which feature of the backbone, if known
    class_names: tuple[str, ...] | None


def load_linear(weights: str | Path) -> tuple[nnx.Linear, LinearInfo]:
    """Loads a linear classifier of frozen features.

    Args:
      weights: a hub name, for the classifier released with it; a `.pth` file of the reference; a
        `head.npz` written by `dino_jax linear`, or the workdir that contains it.
    Returns: (classifier, info); the classifier maps features [B, F] to logits [B, C].
    Raises:
      UsageError: the weights contain no linear classifier.
    """
    head = read_head(weights)
    graphdef, *_ = abstract(lambda rngs: nnx.Linear(*head.kernel.shape, rngs=rngs))
    params = {"kernel": jnp.array(head.kernel), "bias": jnp.array(head.bias)}
    info = LinearInfo(
        str(weights), *head.kernel.shape, head.weights, head.feature, head.class_names
    )
    return nnx.merge(graphdef, params, {}), info


def read_head(weights: str | Path) -> LinearHead:
    """Reads the arrays of a linear classifier; arguments and errors as for `load_linear`."""
    path = local_path(weights, "weights")
    if path.is_dir():
        path = path / "head.npz"
    if path.suffix == ".npz":
        about, arrays = read_arrays(
            path,
            str(weights),
            "give a head.npz, a .pth file or a hub name",
            about=("weights", "feature", "class_names"),
            names=("kernel", "bias"),
        )
        names = about.pop("class_names")
        return LinearHead(**arrays, **about, class_names=names and tuple(names))
    file = find_file(weights, "linear")
    if file is None:
        raise UsageError(f"{weights}: no such file; give a head.npz, a .pth file or a hub name")
    found = read_torch_checkpoint(file)
    if found.kind != "linear":
        raise UsageError(f"{weights} is a backbone, not a linear classifier")
    weight, bias = (np.asarray(found.linear[name], np.float32) for name in ("weight", "bias"))
    return LinearHead(weight.T.copy(), bias.copy())  # copies, so that the file's memory is freed


def write_head(path: Path, head: LinearHead) -> None:
    """Writes a classifier to an `.npz` file, atomically.

    Raises:
      UsageError: the file cannot be written.
    """
    about = {"weights": head.weights, "feature": head.feature, "class_names": head.class_names}
    write_arrays(path, about, {"kernel": head.kernel, "bias": head.bias})


def write_arrays(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays, and facts about them as JSON, to an `.npz` file, atomically."""
    try:
        with whole_or_nothing(path) as part, part.open("wb") as file:
            np.savez(file, about=json.dumps(about), **arrays)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): choose another path"
        ) from error


def read_arrays(
    path: Path, what: str, way_out: str, *, about: tuple[str, ...], names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads facts and arrays from a file written by `write_arrays`.

    Args:
      path: the file.
      what: the file as the user named it, for messages.
      way_out: what to do about a damaged file, for messages.
      about: the names of the facts to read.
      names: the names of the arrays to read.
    Raises:
      UsageError: the file is missing or damaged.
    """
    try:
        # Opened here, so that damaged files are closed too: np.load may return a bare array, which
        # is not a context manager.
        with path.open("rb") as opened, np.load(opened) as file:
            text = json.loads(str(file["about"]))
            return {name: text[name] for name in about}, {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise UsageError(f"{what}: no such file") from error
    except (*BROKEN_ARRAY, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what} is damaged or was not written by this job: {way_out}") from error
