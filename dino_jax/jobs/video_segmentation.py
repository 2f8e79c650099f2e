"""The video segmentation job: DAVIS 2017, from weights and a folder to masks and their score."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm
from tyro.conf import arg

from dino_jax.data.decode import UnreadableImage, decode
from dino_jax.data.pipeline import Records
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.dataset import (
    Video,
    labels_of_patches,
    open_davis,
    read_mask,
    write_mask,
)
from dino_jax.evaluate.davis.propagation import (
    MULTIPLE,
    FramePatches,
    Propagation,
    begin,
    follow,
    network_size,
)
from dino_jax.evaluate.davis.report import ObjectRow, mean_of, object_rows, report
from dino_jax.evaluate.davis.score import object_scores
from dino_jax.evaluate.features.backbone import Pass, PlacedBackbone
from dino_jax.evaluate.features.picture_pass import Group, PicturePass
from dino_jax.jobs.results import check_writable, remove_earlier, write_results
from dino_jax.weights.layouts.architecture import IMAGENET

STD = (0.228, 0.224, 0.225)  # the reference's, which differs from ImageNet's for videos alone


def video_segmentation(
    weights: str,
    data: Path,
    output: Path,
    split: str = "val",
    image_size: int = 480,
    propagation: Annotated[Propagation, arg(name="")] = Propagation(),
    options: Annotated[Pass, arg(name="")] = Pass(batch_size=8),
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
    follower = _Follower(backbone, videos, propagation, image_size)
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


class _Follower:
    """Label maps of videos, one frame after the other."""

    def __init__(
        self,
        backbone: PlacedBackbone,
        videos: Sequence[Video],
        propagation: Propagation,
        image_size: int,
    ) -> None:
        patch_size = backbone.info.patch_size
        if image_size < MULTIPLE:
            raise UsageError(f"image_size={image_size} must be at least {MULTIPLE}")
        if patch_size and (MULTIPLE % patch_size or image_size % patch_size):
            raise UsageError(
                f"image_size={image_size} must be a multiple of the patch size, {patch_size}, and "
                f"that must divide {MULTIPLE}"
            )
        self._backbone, self._passes = backbone, PicturePass(backbone)
        self._propagation, self._image_size = propagation, image_size
        # One number of classes for all videos, so that frames of one size compile once.
        self._num_classes = 1 + max(video.num_objects for video in videos)
        step = partial(follow, settings=propagation, patch_size=patch_size)
        self._step = jax.jit(step, donate_argnums=0)
        for size in sorted({video.first.shape for video in videos}):
            self._passes.check(self._feature(size), size)

    def __call__(self, video: Video) -> Iterator[tuple[int, jax.Array]]:
        """Yields (frame, its label map) of every readable frame but the first."""
        shape, propagation = video.first.shape, self._propagation
        channels = len(self._backbone.info.mean)
        max_unreadable = self._backbone.options.max_unreadable
        records = Records(video.frames, max_unreadable=max_unreadable, channels=channels)
        load = partial(_load, shape=shape, channels=channels)
        group = Group(range(len(video.frames)), shape)
        memory, followed = None, 0
        for batch in self._passes.stream(self._feature(shape), records, load, group):
            # Frames follow each other, so one device does it; they were computed by all.
            batch = {name: values.addressable_data(0) for name, values in batch.items()}
            frames = np.asarray(batch["index"])
            for i in np.flatnonzero(np.asarray(batch["valid"])):
                target = batch["rows"][i]
                if memory is None:
                    first = labels_of_patches(video.first, target.shape[:2], self._num_classes)
                    memory = begin(target, first, propagation)
                    continue
                slot = 1 + followed % max(1, propagation.last_frames)
                memory, labels = self._step(memory, target, slot)
                followed += 1
                yield int(frames[i]), labels

    def _feature(self, shape: tuple[int, int]) -> FramePatches:
        info = self._backbone.info
        std = STD if info.std == IMAGENET["std"] else info.std
        return FramePatches(network_size(*shape, self._image_size), info.mean, std)


def _load(image: Image.Image, shape: tuple[int, int], channels: int) -> np.ndarray:
    pixels = decode(image, channels=channels)
    if pixels.shape[:2] != shape:
        raise UnreadableImage(
            f"{pixels.shape[1]}x{pixels.shape[0]} pixels, and the first frame has "
            f"{shape[1]}x{shape[0]}"
        )
    return pixels


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
