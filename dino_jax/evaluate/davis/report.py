"""Tables of a video segmentation in percent: per object, and means over objects."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dino_jax.evaluate.davis.dataset import Video
from dino_jax.evaluate.davis.score import statistics

MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


class ObjectRow(NamedTuple):
    """One object of one video."""

    video: str
    number: int  # from 1
    values: list[float]  # `MEASURES` in percent


def object_rows(video: Video, scores: Sequence[np.ndarray]) -> list[ObjectRow]:
    """A row for each object of a video.

    Args:
      video: the video.
      scores: J and F of every object, [O, 2] for each scored frame; no rows without scores.
    """
    rows = []
    for i in range(video.num_objects if scores else 0):
        j, f = (statistics(np.array([frame[i, measure] for frame in scores])) for measure in (0, 1))
        values = [(j.mean + f.mean) / 2, *j, *f]
        rows.append(ObjectRow(video.name, i + 1, [100 * value for value in values]))
    return rows


def mean_of(rows: Iterable[ObjectRow]) -> dict[str, float] | None:
    """The mean of each measure over objects; None without objects."""
    values = [row.values for row in rows]
    return dict(zip(MEASURES, np.mean(values, axis=0).tolist(), strict=True)) if values else None
