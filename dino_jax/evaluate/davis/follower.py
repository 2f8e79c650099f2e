"""Propagates the labels of a video from frame to frame; the backbone runs on all devices."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode
from dino_jax.data.pipeline import Records
from dino_jax.data.transforms.color import IMAGENET_STD
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.dataset import (
    Video,
    labels_of_patches,
)
from dino_jax.evaluate.davis.propagation import (
    MULTIPLE,
    FramePatches,
    Propagation,
    follow,
    initial_memory,
    network_size,
)
from dino_jax.evaluate.features.backbone import PlacedBackbone
from dino_jax.evaluate.features.picture_pass import Group, PicturePass

STD = (0.228, 0.224, 0.225)  # of the reference, which differs from ImageNet's for videos only


class Follower:
    """Computes label maps of videos, frame by frame."""

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
                f"image_size={image_size} must be a multiple of the patch size, {patch_size}, "
                f"which must divide {MULTIPLE}"
            )
        self._backbone, self._passes = backbone, PicturePass(backbone)
        self._propagation, self._image_size = propagation, image_size
        # The same number of classes for all videos, so that frames of one size compile once.
        self._num_classes = 1 + max(video.num_objects for video in videos)
        step = partial(follow, settings=propagation, patch_size=patch_size)
        self._step = jax.jit(step, donate_argnums=0)
        for size in sorted({video.first.shape for video in videos}):
            self._passes.check(self._feature(size), size)

    def __call__(self, video: Video) -> Iterator[tuple[int, jax.Array]]:
        """Yields (frame, label map) of every readable frame after the first."""
        shape, propagation = video.first.shape, self._propagation
        channels = len(self._backbone.info.mean)
        options = self._backbone.options
        records = Records(
            video.frames,
            max_unreadable=options.max_unreadable,
            max_pixels=options.max_pixels,
            channels=channels,
        )
        load = partial(_load, shape=shape, channels=channels)
        group = Group(range(len(video.frames)), shape)
        memory, followed = None, 0
        for batch in self._passes.stream(self._feature(shape), records, load, group):
            # The features come from all devices; propagation is sequential and runs on one.
            batch = {name: values.addressable_data(0) for name, values in batch.items()}
            frames = np.asarray(batch["index"])
            for i in np.flatnonzero(np.asarray(batch["valid"])):
                target = batch["rows"][i]
                if memory is None:
                    first = labels_of_patches(video.first, target.shape[:2], self._num_classes)
                    memory = initial_memory(target, first, propagation)
                    continue
                slot = 1 + followed % max(1, propagation.last_frames)
                memory, labels = self._step(memory, target, slot)
                followed += 1
                yield int(frames[i]), labels

    def _feature(self, shape: tuple[int, int]) -> FramePatches:
        info = self._backbone.info
        std = STD if info.std == IMAGENET_STD else info.std
        return FramePatches(network_size(*shape, self._image_size), info.mean, std)


def _load(image: Image.Image, shape: tuple[int, int], channels: int) -> np.ndarray:
    pixels = decode(image, channels=channels)
    if pixels.shape[:2] != shape:
        raise UnreadableImage(
            f"{pixels.shape[1]}x{pixels.shape[0]} pixels, but the first frame has "
            f"{shape[1]}x{shape[0]}"
        )
    return pixels
