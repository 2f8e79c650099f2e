"""Batches in host memory: which records, in which order, read by threads.

A training batch is a function of the seed and the step alone, so a run resumes without any saved
iterator, on any number of processes and threads.

Dims: `B` images of the global batch, `b` of this process's share, `S` side of the canvas, `C`
channels.
"""

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
from dino_jax.data.decode import UnreadableImage, decode, resize_and_crop
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError

T = TypeVar("T")


class Records:
    """Reads the pictures of a source and keeps account of those that cannot be read.

    Each unreadable record is logged once. Safe for many threads.
    """

    def __init__(self, source: Source, *, max_unreadable: float = 0.05, channels: int = 3) -> None:
        """Reads nothing yet.

        Args:
          source: where the pictures come from.
          max_unreadable: share of the source that may be unreadable (ten records always may).
          channels: 3 for RGB, 1 for grey.
        """
        self.source = source
        self.channels = channels
        self._max_unreadable = max_unreadable
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_unreadable(self) -> int:
        """Distinct records found unreadable so far."""
        return len(self._unreadable)

    @property
    def unreadable(self) -> frozenset[int]:
        """Which records these are."""
        with self._lock:
            return frozenset(self._unreadable)

    def read(self, index: int, load: Callable[[Image.Image], T]) -> T | None:
        """What `load` makes of picture `index`, or None, counted, where it is unreadable.

        Args:
          index: record in the source.
          load: decodes the opened image, or raises `UnreadableImage`.

        Raises:
          UsageError: more records are unreadable than may be.
        """
        if index in self._unreadable:
            return None
        try:
            return load(self.source.image(index))
        except UnreadableImage as error:
            self._count(index, str(error))
            return None

    def read_or_next(self, index: int, load: Callable[[Image.Image], T]) -> tuple[T, int]:
        """As `read`, but the next readable picture, in index order and around, stands in.

        Returns:
          What `load` made, and the index of the picture it was made of.

        Raises:
          UsageError: more records are unreadable than may be, or all are.
        """
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            loaded = self.read(candidate, load)
            if loaded is not None:
                return loaded, candidate
        raise UsageError(
            f"none of the {len(self)} images in {self.source.spec} can be read; the log says why"
        )

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self._unreadable:
                return
            self._unreadable.add(index)
            count = len(self._unreadable)
        name, total = self.source.name(index), len(self)
        logging.warning("unreadable image %s: %s", name, reason)
        bound = max(10, int(self._max_unreadable * total))
        if count > bound:
            raise UsageError(
                f"{count} of the {total} images in {self.source.spec} cannot be read, more than "
                f"the {bound} that max_unreadable={self._max_unreadable} allows; the last is "
                f"{name}: {reason}. Repair or remove them (the log names each), or allow more"
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
    """Endless training batches from `start_step` on.

    Every epoch is a new permutation of the source; its last `len(records) % batch_size` records
    are left out. An unreadable record is replaced by the next readable one, under that one's index.

    Args:
      records: the pictures; larger ones are shrunk to the canvas, keeping their shape.
      batch_size: B, over all processes.
      seed: of the order.
      start_step: step of the first batch; a late one costs nothing.
      canvas_size: S, pixels.
      num_threads: that read and decode.
      process_index: of this process; it gets the records i of a global batch with
        `i % process_count == process_index`.
      process_count: processes that share each batch.

    Returns:
      Iterator of `canvas [b, S, S, C]` uint8 (the picture in the top left corner, then zeros),
      `size [b, 2]` int32 (height, width), `index [b]` int32, `label [b]` int32 (-1 for none).

    Raises:
      UsageError: the source is smaller than a batch, or processes do not divide the batch.
    """
    local_size = _local_size(batch_size, process_count)
    steps_per_epoch = len(records) // batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"batch_size={batch_size} is larger than the {len(records)} images in "
            f"{records.source.spec}, so an epoch has no step; choose a smaller batch"
        )
    # `repeat` after the cut, so that batches end with the epoch; grain reshuffles at each repeat.
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
    """All pictures once, in order, for the evaluation transform on the device.

    A picture that does not fit on the canvas gets the transform here, exactly as Pillow does it,
    since shrinking it twice would change its features.

    Args:
      records: the pictures.
      batch_size: B, over all processes.
      canvas_size: S, pixels.
      resize: the transform's shorter side, pixels.
      crop: side of the transform's central square, pixels.
      num_threads: that read and decode.
      process_index: of this process; its share of a batch is as in `train_batches`.
      process_count: processes that share each batch.

    Returns:
      Iterator of the entries of `train_batches`, and `done [b]` bool, True where the canvas holds
      the finished crop, and `valid [b]` bool, False for a picture that cannot be read (black) and
      for the filling of the last batch (black, index -1).

    Raises:
      UsageError: the crop does not fit on the canvas or in the resized picture, or processes do
        not divide the batch.
    """
    local_size = _local_size(batch_size, process_count)
    if crop > min(canvas_size, resize):
        raise UsageError(
            f"crop={crop} must not exceed canvas_size={canvas_size} nor resize={resize}"
        )
    count, source, channels = len(records), records.source, records.channels
    blank = np.zeros((crop, crop, channels), np.uint8), True

    def load(image: Image.Image) -> tuple[np.ndarray, bool]:
        if max(image.size) > canvas_size:
            return resize_and_crop(image, resize, crop, channels), True
        return decode(image, channels=channels), False

    def read(index: int) -> dict[str, Any]:
        filling = index >= count
        loaded = None if filling else records.read(index, load)
        pixels, done = loaded or blank
        return {
            "pixels": pixels,
            "index": -1 if filling else index,
            "label": -1 if filling else source.label(index),
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
