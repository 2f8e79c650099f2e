"""The video segmentation job: DAVIS 2017, from weights and a folder to masks and their score."""

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
from dino_jax.jobs.results import table, write_results
from dino_jax.output import check_writable, remove_earlier


def video_segmentation(
    weights: str,
    data: Path,
    output: Path,
    split: str = "val",
    image_size: int = 480,
    propagation: Annotated[Propagation, arg(name="")] = Propagation(),
    options: Annotated[PassOptions, arg(name="")] = PassOptions(batch_size=8),
) -> dict[str, float] | None:
    """Follows the objects of DAVIS 2017 from their masks in the first frame, and scores that.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP; of a ViT.
      data: The folder of DAVIS 2017, with ImageSets, JPEGImages and Annotations.
      output: A folder for the masks (SEQUENCE/00000.png, ...), results.json, per_sequence.csv and
        per_object.csv.
      split: The list in ImageSets/2017.
      image_size: Pixels of a frame's shorter side.
      propagation: How labels are handed on.
      options: How the backbone goes over the frames.

    Returns: J&F and its parts in percent, means over all objects; None where no sequence has the
      masks for it.
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
        report(output, rows)
        if skipped:
            print(f"frames or masks that cannot be read and were left out: {len(skipped)}")
        settings = {"weights": weights, "data": data, "split": split, "image_size": image_size}
        settings |= dataclasses.asdict(propagation) | dataclasses.asdict(options)
        scored = {row.video for row in rows}
        unscored = [video.name for video in videos if video.name not in scored]
        if unscored:
            print(f"sequences without masks to be scored by: {len(unscored)} of {len(videos)}")
        metrics = {
            "video_segmentation": found,
            "objects": len(rows),
            "sequences_without_score": unscored,
            "unreadable_images": skipped,
        }
        file = output / "results.json"
        write_results(file, "video-segmentation", metrics, settings, backbone.info)
    return found


def _check_apart(output: Path, data: Path, videos: Sequence[Video]) -> None:
    """Raises UsageError where masks would fall on the data set, or outside the output."""
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
                f"output={output} has a folder of the data set, {folder}, whose masks or frames "
                "would be overwritten: give another folder"
            )
        if output.resolve() not in folder.parents:
            raise UsageError(
                f"sequence {name!r} would be written to {folder}, outside output={output}: "
                "mend the list of sequences"
            )


def _write(output: Path, video: Video, frame: int, labels: np.ndarray) -> None:
    if jax.process_index() == 0:
        write_mask(output / video.name / f"{video.frame_names[frame]}.png", labels)


def _finish(output: Path, video: Video, frame: int, labels: jax.Array) -> np.ndarray | None:
    """Writes a frame's mask; its J and F [O, 2], or None where it is not to be scored."""
    size = video.first.shape[::-1]
    mask = np.asarray(Image.fromarray(np.asarray(labels)).resize(size, Image.Resampling.NEAREST))
    _write(output, video, frame, mask)
    if frame not in video.masks:
        return None
    try:
        truth = read_mask(video.masks[frame], video.first.shape)
    except UnreadableImage as error:
        logging.warning("unreadable mask: %s", error)
        return None
    return object_scores(mask, truth, video.num_objects)


def _skipped(video: Video, scores: dict[int, np.ndarray | None]) -> list[str]:
    """Frames without labels, and true masks that could not be read."""
    frames = [video.frames.name(i) for i in range(1, len(video.frames)) if i not in scores]
    masks = [str(path) for i, path in video.masks.items() if scores.get(i, 0) is None]
    return frames + masks


def report(output: Path, rows: Sequence[ObjectRow]) -> None:
    """Writes per_object.csv and per_sequence.csv, and prints the latter with the mean of all.

    Args:
      output: folder of the files.
      rows: of all videos.
    """

    def rounded(values: Iterable[float]) -> list[str]:
        return [f"{value:.2f}" for value in values]

    videos = dict.fromkeys(row.video for row in rows)
    sequences = [
        [name, *rounded(mean_of(row for row in rows if row.video == name).values())]
        for name in videos
    ]
    objects = [[row.video, row.number, *rounded(row.values)] for row in rows]
    for name, header, lines in (
        ("per_sequence.csv", ["Sequence"], sequences),
        ("per_object.csv", ["Sequence", "Object"], objects),
    ):
        with (output / name).open("w", newline="") as file:
            csv.writer(file).writerows([[*header, *MEASURES], *lines])
    if rows:
        total = ["all objects", *rounded(mean_of(rows).values())]
        print(table(["sequence, %", *MEASURES], [*sequences, total]))
