"""Revisited Oxford and Paris on disk: images, and a list of them with the ground truth.

A folder such as `roxford5k` contains `gnd_roxford5k.pkl` and the images in `jpg`
(http://cmp.felk.cvut.cz/revisitop).
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax.data.sources.files import Files
from dino_jax.errors import UsageError, listed
from dino_jax.weights.formats.pth.plain_pickle import read_plain_pickle

LISTS = ("easy", "hard", "junk")


@dataclasses.dataclass(frozen=True)
class Revisited:
    """A database, its queries and their ground truth."""

    pictures: Files  # the database, followed by the queries
    num_images: int  # of the database
    truth: tuple[dict[str, np.ndarray], ...]  # for each query its `LISTS`, each [n] int64

    def truth_among(self, readable: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The ground truth without unreadable pictures.

        An unreadable image of the database is junk for every query; an unreadable query has no
        positives.

        Args:
          readable: [len(pictures)] bool.
        """
        broken = np.flatnonzero(~readable[: self.num_images])
        lists = []
        for truth, is_readable in zip(self.truth, readable[self.num_images :], strict=True):
            lists.append({name: np.setdiff1d(truth[name], broken) for name in LISTS})
            if not is_readable:
                lists[-1] |= {"easy": broken[:0], "hard": broken[:0]}
            lists[-1]["junk"] = np.union1d(truth["junk"], broken)
        return lists


def open_revisited(folder: Path) -> Revisited:
    """Opens one of the two data sets; reads no picture.

    Args:
      folder: contains `gnd_*.pkl` and `jpg`.
    Raises:
      UsageError: there is no list, or several; or it has another format, or names missing images.
    """
    found = sorted(folder.glob("gnd_*.pkl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no list"
        raise UsageError(
            f"data={folder} must contain one list gnd_*.pkl and the folder jpg, but contains "
            f"{names}: use the folder of one data set, such as roxford5k"
        )
    value = read_plain_pickle(found[0])
    try:
        images, queries = (_names(value[key]) for key in ("imlist", "qimlist"))
        truth = tuple(_truth(entry, len(images)) for entry in value["gnd"])
        if len(truth) != len(queries) or not queries:
            raise ValueError(f"{len(queries)} queries and {len(truth)} ground truths")
    except KeyError as error:
        raise UsageError(
            f"{found[0]} has no {error}: use the list of a revisited data set, which has imlist, "
            "qimlist and gnd with easy, hard and junk"
        ) from error
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{found[0]} is not a list of images with ground truth: {error}"
        ) from error
    jpg = folder / "jpg"
    _check_present([*images, *queries], jpg)
    pictures = Files(str(folder), [jpg / name for name in (*images, *queries)])
    return Revisited(pictures, len(images), truth)


def _names(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise TypeError("the names of its images are not a list of strings")
    return [f"{name}.jpg" for name in value]


def _truth(entry: Any, num_images: int) -> dict[str, np.ndarray]:
    lists = {}
    for name in LISTS:
        rows = np.asarray(entry[name])
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(f"{name!r} is not a list of integers")
        if rows.size and not 0 <= rows.min() <= rows.max() < num_images:
            raise ValueError(f"{name!r} has indices beyond the {num_images} images")
        lists[name] = rows.astype(np.int64)
    return lists


def _check_present(names: Iterable[str], folder: Path) -> None:
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror}") from error
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if name not in present]:
        raise UsageError(
            f"{len(missing)} of {len(names)} images are missing in {folder}: "
            f"{listed(missing)}; unpack all archives of the data set there"
        )
