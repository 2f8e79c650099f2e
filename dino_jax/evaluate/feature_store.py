"""Features on disk: computed once, and never taken for those of other weights or images.

A store is a folder; an entry is a folder in it, named by a hash of all that decides its numbers:
`about.json` says what that is, `features.npy`, `labels.npy` and `index.npy` are the fields of
`features.Features`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax.data.sources import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import Features

About = dict[str, Any]

ABOUT = "about.json"


def describe_data(source: Source) -> About:
    """The listing of a source: `spec`, `images` and a hash of the names."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(os.fsencode(source.name(i)) + b"\0")
    return {"spec": source.spec, "images": len(source), "names": digest.hexdigest()}


def entry_of(store: Path, about: About) -> Path:
    """The folder of an entry, whether or not it is there."""
    text = json.dumps(about, sort_keys=True)
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
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"the features in {entry} are damaged: remove that folder") from error
    if len({len(rows) for rows in found}) != 1:
        raise UsageError(f"the features in {entry} are damaged: remove that folder")
    return found


def _why_not(store: Path, about: About) -> str:
    """In which way the entries of a store are others."""
    if not store.is_dir():
        return f"there are no features in {store}, which is no folder: make them by --save-features"
    spec = about["data"]["spec"]
    others = [json.loads(path.read_text()) for path in sorted(store.glob(f"*/{ABOUT}"))]
    same_data = [other for other in others if other["data"]["spec"] == spec]
    if not same_data:
        specs = ", ".join(sorted({other["data"]["spec"] for other in others})) or "nothing"
        return f"{store} holds no features of {spec}, but of {specs}: make them by --save-features"
    nearest = max(same_data, key=lambda other: sum(other[key] == about[key] for key in about))
    differ = [
        f"{key} {_short(nearest[key])} instead of {_short(about[key])}"
        for key in about
        if nearest[key] != about[key]
    ]
    return (
        f"the features of {spec} in {store} are others than asked for: {'; '.join(differ)}: make "
        "new ones by --save-features"
    )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a SHA-256
