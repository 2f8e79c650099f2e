"""Features on disk: computed once, and never reused for other weights, images or settings.

A cache is a folder with one folder per entry, named by a hash of everything that determines the
features. In an entry, `about.json` describes them; `features.npy`, `labels.npy` and `index.npy` are
the fields of `square_pass.Features`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.data.sources import Source
from dino_jax.errors import UsageError, listed
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.output import check_folder
from dino_jax.paths import local_path
from dino_jax.weights.linear import BROKEN_ARRAY

About = dict[str, Any]

ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Where features are stored between jobs."""

    # Folder to store features in; features that are already there are not computed again.
    save_features: Path | None = None
    # Folder to read features from: nothing is computed, and features of other weights, images or
    # settings are rejected.
    load_features: Path | None = None

    def __post_init__(self) -> None:
        for name in ("save_features", "load_features"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, local_path(folder, name))

    def features(
        self,
        sources: Sequence[Source],
        about: Callable[[Source], About],
        compute: Callable[[Source], Features],
    ) -> list[Features]:
        """Reads the features of sources from the cache; computes and stores the missing ones.

        Args:
          sources: the images.
          about: everything that determines the features of a source; only called if there is a
            cache.
          compute: computes the features of a source, over all hosts.
        Raises:
          UsageError: required features are missing, or the cache cannot be written; before anything
            is computed.
        """
        if self.load_features:
            return [read_entry(self.load_features, about(source)) for source in sources]
        if not self.save_features:
            return [compute(source) for source in sources]
        folder, abouts = self.save_features, [about(source) for source in sources]
        cached = _are_cached(folder, abouts)
        if not all(cached):
            check_folder(folder, "save_features")
        # Damaged entries are found before anything is computed.
        found = [
            read_entry(folder, key) if is_cached else None
            for key, is_cached in zip(abouts, cached, strict=True)
        ]
        for i, source in enumerate(sources):
            if found[i] is None:
                found[i] = compute(source)
                if jax.process_index() == 0:
                    write_entry(folder, abouts[i], found[i])
        return found


def _are_cached(folder: Path, abouts: Sequence[About]) -> list[bool]:
    """Which entries exist; all hosts must agree, as they compute the others together."""
    here = np.array([entry_of(folder, about).is_dir() for about in abouts])
    everywhere = multihost_utils.process_allgather(here).reshape(-1, len(here))
    if (everywhere != here).any():
        raise UsageError(
            f"save_features={folder} must be a folder that all hosts share, as must the images"
        )
    return here.tolist()


def describe_data(source: Source) -> About:
    """Describes a source: `spec`, `images` and a hash of its pictures and class names."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for i in range(len(source)):
        digest.update(os.fsencode(source.stamp(i)) + b"\0")
    return {"spec": source.spec, "images": len(source), "listing": digest.hexdigest()}


def decisive(about: Any) -> Any:
    """Drops the spelling of sources, which does not affect their features."""
    if not isinstance(about, dict):
        return about
    return {key: decisive(value) for key, value in about.items() if key != "spec"}


def entry_of(folder: Path, about: About) -> Path:
    """The folder of an entry, whether it exists or not."""
    text = json.dumps(decisive(about), sort_keys=True)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:16]


def write_entry(folder: Path, about: About, features: Features) -> None:
    """Writes an entry atomically; replaces an existing one.

    Args:
      folder: of the cache; created if missing.
      about: everything that determines the features, as JSON values.
      features: to write.
    Raises:
      UsageError: the folder cannot be written.
    """
    entry = entry_of(folder, about)
    part = entry.with_suffix(f".{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, array in features._asdict().items():
            np.save(part / f"{name}.npy", array)
        (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        shutil.rmtree(entry, ignore_errors=True)
        part.rename(entry)
    except OSError as error:
        raise UsageError(f"features cannot be saved in {folder} ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_entry(folder: Path, about: About) -> Features:
    """Reads the entry with exactly this description.

    Raises:
      UsageError: there is no such entry (the message explains how the closest one differs), or it
        is damaged.
    """
    entry = entry_of(folder, about)
    if not (entry / ABOUT).is_file():
        raise UsageError(_mismatch(folder, about))
    try:
        found = Features(*(np.load(entry / f"{name}.npy") for name in Features._fields))
        if len({len(rows) for rows in found}) != 1:
            raise ValueError("the numbers of labels and features differ")
    except BROKEN_ARRAY as error:
        raise UsageError(f"the features in {entry} are damaged: remove that folder") from error
    return found


def _mismatch(folder: Path, about: About) -> str:
    """Explains how the cached features differ from those requested."""
    way_out = "compute them with --save-features"
    if not folder.is_dir():
        return f"load_features={folder} is not a folder: {way_out}"
    spec = about["data"]["spec"]
    entries = _entries(folder)
    same_data = [
        entry
        for entry in entries
        if entry["data"]["spec"] == spec or decisive(entry["data"]) == decisive(about["data"])
    ]
    if not same_data:
        specs = listed(sorted({entry["data"]["spec"] for entry in entries})) or "nothing"
        return f"{folder} has no features of {spec}, only of {specs}: {way_out}"

    def differing(entry: About) -> list[str]:
        return [key for key in about if decisive(entry.get(key)) != decisive(about[key])]

    closest = min(same_data, key=lambda entry: len(differing(entry)))
    differences = "; ".join(
        f"{key} {_short(closest.get(key))} instead of {_short(about[key])}"
        for key in differing(closest)
    )
    return f"the features of {spec} in {folder} do not match: {differences}: {way_out}"


def _entries(folder: Path) -> list[About]:
    """Descriptions of all entries; skips damaged and foreign ones."""
    found = []
    for path in sorted(folder.glob(f"*/{ABOUT}")):
        try:
            about = json.loads(path.read_text())
            if isinstance(about["data"]["spec"], str):
                found.append(about)
        except (OSError, KeyError, TypeError, ValueError):
            continue
    return found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a SHA-256
