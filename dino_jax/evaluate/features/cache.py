"""Features on disk: computed once, and never taken for those of other weights or images.

A store is a folder; an entry is a folder in it, named by a hash of all that decides its numbers:
`about.json` says what that is, and how its source was spelled; `features.npy`, `labels.npy` and
`index.npy` are the fields of `features.Features`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.output import check_folder

About = dict[str, Any]

ABOUT = "about.json"
# What NumPy raises of a damaged file; it reads an array's header as Python.
BROKEN_ARRAY = (OSError, TypeError, ValueError, EOFError, SyntaxError, TokenError)


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Where features are kept from job to job."""

    # Folder to keep features in; what it already holds is not computed again.
    save_features: Path | None = None
    # Folder that holds the features: none are computed, and those of other weights, images or
    # settings are refused.
    load_features: Path | None = None

    def features(
        self, abouts: Iterable[About], computations: Sequence[Callable[[], Features]]
    ) -> list[Features]:
        """Features from the cache, or computed.

        Args:
          abouts: all that decides the numbers of each; asked for only where there is a cache.
          computations: how each is computed, over all hosts.
        Raises:
          UsageError: features that must be in the cache are not, or it cannot be written; before
            anything is computed.
        """
        if self.load_features:
            return [load(self.load_features, about) for about in abouts]
        if not self.save_features:
            return [compute() for compute in computations]
        store, abouts, found = self.save_features, list(abouts), []
        # Looked up at once, before any is written: hosts must agree on what is to be computed.
        there = np.array([entry_of(store, about).is_dir() for about in abouts])
        everywhere = multihost_utils.process_allgather(there).reshape(-1, len(there))
        if (everywhere != there).any():
            raise UsageError(
                f"save_features={store} must be a folder that all hosts share, as must the images"
            )
        if not there.all():
            check_folder(store, "save_features")
        for about, compute, is_there in zip(abouts, computations, there, strict=True):
            found.append(load(store, about) if is_there else compute())
            if not is_there and jax.process_index() == 0:
                save(store, about, found[-1])
        return found


def describe_data(source: Source) -> About:
    """The listing of a source: `spec`, `images` and a hash of its pictures and names of classes."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for i in range(len(source)):
        digest.update(os.fsencode(source.stamp(i)) + b"\0")
    return {"spec": source.spec, "images": len(source), "listing": digest.hexdigest()}


def decisive(about: Any) -> Any:
    """All but how sources are spelled: pictures of one listing are the same."""
    if not isinstance(about, dict):
        return about
    return {key: decisive(value) for key, value in about.items() if key != "spec"}


def entry_of(store: Path, about: About) -> Path:
    """The folder of an entry, whether or not it is there."""
    text = json.dumps(decisive(about), sort_keys=True)
    return store / hashlib.sha256(text.encode()).hexdigest()[:16]


def save(store: Path, about: About, features: Features) -> None:
    """Writes an entry; one that is there is replaced, and a stop midway leaves none.

    Args:
      store: the folder, made where it does not exist.
      about: all that decides the numbers, as JSON has it.
      features: to be written.
    Raises:
      UsageError: the folder cannot be written.
    """
    entry = entry_of(store, about)
    part = entry.with_suffix(f".{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, array in features._asdict().items():
            np.save(part / f"{name}.npy", array)
        (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        shutil.rmtree(entry, ignore_errors=True)
        part.rename(entry)
    except OSError as error:
        raise UsageError(f"features cannot be saved in {store} ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(store: Path, about: About) -> Features:
    """Reads the entry that is about just this.

    Raises:
      UsageError: there is none, and what differs in the nearest; or it is damaged.
    """
    entry = entry_of(store, about)
    if not (entry / ABOUT).is_file():
        raise UsageError(_why_not(store, about))
    try:
        found = Features(*(np.load(entry / f"{name}.npy") for name in Features._fields))
        if len({len(rows) for rows in found}) != 1:
            raise ValueError("not as many labels as features")
    except BROKEN_ARRAY as error:
        raise UsageError(f"the features in {entry} are damaged: remove that folder") from error
    return found


def _why_not(store: Path, about: About) -> str:
    """In which way the entries of a store are others."""
    if not store.is_dir():
        return f"there are no features in {store}, which is no folder: make them by --save-features"
    spec = about["data"]["spec"]
    others = _entries(store)
    same_data = [
        other
        for other in others
        if other["data"]["spec"] == spec or decisive(other["data"]) == decisive(about["data"])
    ]
    if not same_data:
        specs = ", ".join(sorted({other["data"]["spec"] for other in others})) or "nothing"
        return f"{store} holds no features of {spec}, but of {specs}: make them by --save-features"

    def differing(other: About) -> list[str]:
        return [key for key in about if decisive(other.get(key)) != decisive(about[key])]

    nearest = min(same_data, key=lambda other: len(differing(other)))
    differ = [
        f"{key} {_short(nearest.get(key))} instead of {_short(about[key])}"
        for key in differing(nearest)
    ]
    return (
        f"the features of {spec} in {store} are others than asked for: {'; '.join(differ)}: make "
        "new ones by --save-features"
    )


def _entries(store: Path) -> list[About]:
    """What the entries of a store are about; damaged and foreign ones are none."""
    found = []
    for path in sorted(store.glob(f"*/{ABOUT}")):
        try:
            other = json.loads(path.read_text())
            if isinstance(other["data"]["spec"], str):
                found.append(other)
        except (OSError, KeyError, TypeError, ValueError):
            continue
    return found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a SHA-256
