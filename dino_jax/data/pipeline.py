"""Training and evaluation batches in host memory.

A training batch depends on the seed and the step only, so a run resumes without a saved iterator,
on any number of processes and threads.

Dims: `B` images in the global batch, `b` in this process's share, `S` side of the canvas, `C`
channels.
"""

import contextlib
import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dino_jax.data.batches import Batch, counted, in_batches
from dino_jax.data.decode import MAX_PIXELS, UnreadableImage, decode, resize_and_crop
from dino_jax.data.sources import Source
from dino_jax.errors import UsageError
from dino_jax.text import printable

T = TypeVar("T")

# Pixels; larger images are decoded one at a time, so that memory does not grow with the threads.
_LARGE = MAX_PIXELS // 2
_one_large = threading.Lock()


class Records:
    """Reads the images of a source, and logs and counts those that are unreadable.

    Each unreadable image is logged once. Thread-safe.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_unreadable: float = 0.05,
        max_pixels: int = MAX_PIXELS,
        channels: int = 3,
    ) -> None:
        """Reads nothing yet.

        Args:
          source: the images.
          max_unreadable: share of the images that may be unreadable; ten are always allowed.
          max_pixels: images with more pixels are unreadable.
          channels: 3 for RGB, 1 for grey.
        """
        self.source = source
        self.channels = channels
        self._max_unreadable = max_unreadable
        self._max_pixels = max_pixels
        self._is_dark = False  # whether dark 16-bit images were reported
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_unreadable(self) -> int:
        """Number of images found unreadable so far."""
        return len(self._unreadable)

    @property
    def unreadable(self) -> frozenset[int]:
        """Indices of the images found unreadable so far."""
        with self._lock:
            return frozenset(self._unreadable)

    def read(self, index: int, load: Callable[[Image.Image], T]) -> T | None:
        """Loads image `index`; returns None if it is unreadable, and counts it.

        Args:
          index: index in the source.
          load: decodes the opened image, or raises `UnreadableImage`.

        Raises:
          UsageError: more images are unreadable than allowed.
        """
        if index in self._unreadable:
            return None
        try:
            image = self.source.image(index)
            pixels = image.width * image.height
            if pixels > self._max_pixels:
                image.close()
                raise UnreadableImage(
                    f"{image.width}x{image.height} is {pixels} pixels, more than "
                    f"max_pixels={self._max_pixels}: shrink the image, or raise max_pixels"
                )
            with _one_large if pixels > _LARGE else contextlib.nullcontext():
                if image.mode.startswith("I;16") and not self._is_dark:
                    self._report_if_dark(image, index)
                return load(image)
        except UnreadableImage as error:
            self._count(index, str(error))
            return None

    def read_or_next(self, index: int, load: Callable[[Image.Image], T]) -> tuple[T, int]:
        """As `read`, but replaces an unreadable image by the next readable one, cyclically.

        Returns:
          The result of `load`, and the index of the image that was loaded.

        Raises:
          UsageError: more images are unreadable than allowed, or all are.
        """
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            loaded = self.read(candidate, load)
            if loaded is not None:
                return loaded, candidate
        raise UsageError(
            f"none of the {len(self)} images in {self.source.spec} can be read; "
            "the log gives the reasons"
        )

    def _report_if_dark(self, image: Image.Image, index: int) -> None:
        """Warns once about 16-bit images whose values have only 12 bits."""
        try:
            largest = np.asarray(image).max(initial=0)
        except (OSError, SyntaxError, ValueError):
            return  # damaged: loading it reports the reason
        if not 0 < largest < 2**12:
            return
        with self._lock:
            if self._is_dark:
                return
            self._is_dark = True
        logging.warning(
            "%s has 16 bits per pixel but no value above %d, so it becomes almost black, as may "
            "others of %s: convert such images to 8 bits, for example with "
            "Image.fromarray((numpy.asarray(image) >> 4).astype('uint8')).save(path)",
            printable(self.source.name(index)),
            largest,
            self.source.spec,
        )

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self._unreadable:
                return
            self._unreadable.add(index)
            count = len(self._unreadable)
        name, total = printable(self.source.name(index)), len(self)
        logging.warning("unreadable image %s: %s", name, reason)
        bound = max(10, int(self._max_unreadable * total))
        if count > bound:
            raise UsageError(
                f"{count} of the {total} images in {self.source.spec} cannot be read, but "
                f"max_unreadable={self._max_unreadable} allows {bound}; the last is {name}: "
                f"{reason}. Repair or remove them (the log lists all), or raise max_unreadable"
            )


def train_batches(
    records: Records,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    canvas_size: int,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches, beginning at `start_step`.

    Every epoch is a new permutation of the source, without its last `len(records) % batch_size`
    images. An unreadable image is replaced by the next readable one, including index and label.

    Args:
      records: the images; those larger than the canvas are shrunk, keeping their aspect ratio.
      batch_size: B, over all processes.
      seed: seed of the permutations.
      start_step: step of the first batch; a large value costs nothing.
      canvas_size: S, in pixels.
      num_threads: number of threads that read and decode.
      process_index: index of this process; it gets the images i of a global batch with
        `i % process_count == process_index`.
      process_count: processes that share each batch.

    Returns:
      Iterator of `canvas [b, S, S, C]` uint8 (the image in the top left corner, then zeros),
      `size [b, 2]` int32 (height, width), `index [b]` int32, `label [b]` int32 (-1 for none).

    Raises:
      UsageError: the source is smaller than a batch, or `process_count` does not divide the batch.
    """
    local_size = _local_size(batch_size, process_count)
    steps_per_epoch = len(records) // batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"batch_size={batch_size} is larger than the {len(records)} images in "
            f"{records.source.spec}, so an epoch has no steps; choose a smaller batch"
        )
    # `repeat` follows the slice so that no batch spans two epochs; grain reshuffles every epoch.
    order = counted(len(records)).seed(seed).shuffle()
    order = order[: steps_per_epoch * batch_size].repeat()
    order = order[process_index::process_count][start_step * local_size :]
    load = functools.partial(decode, max_side=canvas_size, channels=records.channels)

    def read(index: int) -> dict[str, Any]:
        pixels, index = records.read_or_next(index, load)
        return {"pixels": pixels, "index": index, "label": records.source.label(index)}

    shape = canvas_size, canvas_size, records.channels
    return in_batches(order, read, local_size, shape, num_threads)


def eval_batches(
    records: Records,
    *,
    batch_size: int,
    canvas_size: int,
    resize: int,
    crop: int,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All images once, in order, for the evaluation transform on the device.

    An image that does not fit on the canvas is transformed here, by Pillow, since shrinking it
    twice would change its features.

    Args:
      records: the images.
      batch_size: B, over all processes.
      canvas_size: S, in pixels.
      resize: shorter side after resizing, in pixels.
      crop: side of the central square, in pixels.
      num_threads: number of threads that read and decode.
      process_index: index of this process; its share of a batch is as in `train_batches`.
      process_count: processes that share each batch.

    Returns:
      Iterator of the entries of `train_batches`, plus `done [b]` bool, True if the canvas contains
      the finished crop, and `valid [b]` bool, False for an unreadable image (black) and for the
      padding of the last batch (black, index -1).

    Raises:
      UsageError: the crop does not fit on the canvas or in the resized image, or `process_count`
        does not divide the batch.
    """
    local_size = _local_size(batch_size, process_count)
    if crop > min(canvas_size, resize):
        raise UsageError(
            f"crop={crop} must not exceed canvas_size={canvas_size} or resize={resize}"
        )
    count, source, channels = len(records), records.source, records.channels
    blank = np.zeros((crop, crop, channels), np.uint8), True

    def load(image: Image.Image) -> tuple[np.ndarray, bool]:
        if max(image.size) > canvas_size:
            return resize_and_crop(image, resize, crop, channels), True
        return decode(image, channels=channels), False

    def read(index: int) -> dict[str, Any]:
        padding = index >= count
        loaded = None if padding else records.read(index, load)
        pixels, done = loaded or blank
        return {
            "pixels": pixels,
            "index": -1 if padding else index,
            "label": -1 if padding else source.label(index),
            "done": done,
            "valid": loaded is not None,
        }

    order = counted(math.ceil(count / batch_size) * batch_size)
    order = order[process_index::process_count]
    return in_batches(order, read, local_size, (canvas_size, canvas_size, channels), num_threads)


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UsageError(
            f"batch_size={batch_size} is not divisible by the {process_count} processes; "
            "choose a multiple"
        )
    return batch_size // process_count
