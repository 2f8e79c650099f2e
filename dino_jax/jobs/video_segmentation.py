"""The video-segmentation job: DAVIS 2017, masks and their score."""

import csv
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm
from tyro.conf import arg

from dino_jax.data.decode import UnreadableImage
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.dataset import (
    Video,
    open_davis,
    read_mask,
    write_mask,
)
from dino_jax.evaluate.davis.follower import Follower
from dino_jax.evaluate.davis.propagation import (
    Propagation,
)
from dino_jax.evaluate.davis.report import MEASURES, ObjectRow, mean_of, object_rows
from dino_jax.evaluate.davis.score import object_scores
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.jobs.results import report
from dino_jax.output import check_writable, remove_earlier
from dino_jax.paths import local_paths


@local_paths
def video_segmentation(
    weights: str,
    data: Path,
    output: Path,
    split: str = "val",
    image_size: int = 480,
    propagation: Annotated[Propagation, arg(name="")] = Propagation(),
    options: Annotated[PassOptions, arg(name="")] = PassOptions(batch_size=8),
) -> dict[str, float] | None:
    """Propagates the masks of the first frame of each DAVIS 2017 video, and scores the result.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP; of a ViT.
      data: Folder of DAVIS 2017, with ImageSets, JPEGImages and Annotations.
      output: Output folder for the masks (SEQUENCE/00000.png, ...), results.json, per_sequence.csv
        and per_object.csv.
      split: Name of a list in ImageSets/2017.
      image_size: Pixels of the shorter side of a frame.
      propagation: How labels are propagated.
      options: How the backbone processes the frames.

    Returns: J&F and its parts in percent, means over all objects; None if no sequence has masks to
      compare with.
    Raises:
      UsageError: something cannot be loaded, read or written, a setting is out of range, or the
        network has no patch tokens.
    """
    check_writable(output / "results.json")
    videos = open_davis(data, split)
    _check_apart(output, data, videos)
    backbone = PlacedBackbone(weights, options)
    follower = Follower(backbone, videos, propagation, image_size)
    rows: list[ObjectRow] = []
    skipped: list[str] = []
    total = sum(len(video.frames) for video in videos)
    with (
        tqdm(total=total, unit=" frames", disable=jax.process_index() > 0) as bar,
        ThreadPoolExecutor(options.num_threads) as threads,
    ):
        for video in videos:
            bar.set_description(video.name)
            (output / video.name).mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                remove_earlier(output / video.name, r"\d{5}\.png")
            _write(output, video, 0, video.first)
            bar.update()
            under_way = {}
            for frame, labels in follower(video):
                under_way[frame] = threads.submit(_finish, output, video, frame, labels)
                bar.update()
            scores = {frame: future.result() for frame, future in under_way.items()}
            skipped += _skipped(video, scores)
            rows += object_rows(video, [x for x in scores.values() if x is not None])
    found = mean_of(rows)
    if jax.process_index() == 0:
        _write_csv(output / "per_sequence.csv", ["Sequence"], _sequence_rows(rows))
        objects = [[row.video, row.number, *_rounded(row.values)] for row in rows]
        _write_csv(output / "per_object.csv", ["Sequence", "Object"], objects)
    scored = {row.video for row in rows}
    unscored = [video.name for video in videos if video.name not in scored]
    metrics = {
        "video_segmentation": found,
        "objects": len(rows),
        "sequences_without_score": unscored,
        "unreadable_images": skipped,
    }
    settings = {"weights": weights, "data": data, "split": split, "image_size": image_size}
    total = [["all objects", *_rounded(found.values())]] if found else []
    report(
        output / "results.json",
        "video-segmentation",
        metrics,
        settings | dataclasses.asdict(propagation) | dataclasses.asdict(options),
        backbone.info,
        header=["sequence, %", *MEASURES],
        rows=_sequence_rows(rows) + total,
        notes=[f"not scored, for lack of masks: {len(unscored)} of {len(videos)} sequences"]
        if unscored
        else [],
        unreadable={str(data): len(skipped)},
    )
    return found


def _check_apart(output: Path, data: Path, videos: Sequence[Video]) -> None:
    """Raises UsageError if masks would overwrite the data set, or land outside the output."""
    names = [video.name for video in videos]
    read = {
        (data / kind / "480p" / name).resolve()
        for kind in ("JPEGImages", "Annotations")
        for name in names
    }
    for name in names:
        folder = (output / name).resolve()
        if folder in read:
            raise UsageError(
                f"output={output} contains {folder}, a folder of the data set that would be "
                "overwritten: choose another folder"
            )
        if output.resolve() not in folder.parents:
            raise UsageError(
                f"sequence {name!r} would be written to {folder}, outside output={output}: "
                "fix the list of sequences"
            )


def _write(output: Path, video: Video, frame: int, labels: np.ndarray) -> None:
    if jax.process_index() == 0:
        write_mask(output / video.name / f"{video.frame_names[frame]}.png", labels)


def _finish(output: Path, video: Video, frame: int, labels: jax.Array) -> np.ndarray | None:
    """Writes the mask of a frame; returns J and F [O, 2], or None if it is not scored."""
    size = video.first.shape[::-1]
    mask = np.asarray(Image.fromarray(np.asarray(labels)).resize(size, Image.Resampling.NEAREST))
    _write(output, video, frame, mask)
    if frame not in video.masks:
        return None
    try:
        truth = read_mask(video.masks[frame], video.first.shape, is_binary=video.is_binary)
    except UnreadableImage as error:
        logging.warning("unreadable mask: %s", error)
        return None
    return object_scores(mask, truth, video.num_objects)


def _skipped(video: Video, scores: dict[int, np.ndarray | None]) -> list[str]:
    """Unreadable frames, and unreadable true masks."""
    frames = [video.frames.name(i) for i in range(1, len(video.frames)) if i not in scores]
    masks = [str(path) for i, path in video.masks.items() if scores.get(i, 0) is None]
    return frames + masks


def _sequence_rows(rows: Sequence[ObjectRow]) -> list[list[str]]:
    """The mean over the objects of every video."""
    return [
        [name, *_rounded(mean_of(row for row in rows if row.video == name).values())]
        for name in dict.fromkeys(row.video for row in rows)
    ]


def _rounded(values: Iterable[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([[*header, *MEASURES], *rows])
