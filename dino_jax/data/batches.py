"""Batches of images, read ahead by threads.

Dims: `b` images in this process's share of a batch, `C` channels.
"""

import collections
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_jax.errors import UsageError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

# Records per task. Starting a task costs as much as reading a small image, and threads that pass
# the interpreter lock on after every record are slower than a single thread.
_CHUNK = 16


def counted(number: int) -> "grain.MapDataset":
    """The integers below `number`, to be shuffled, sliced and passed to `in_batches`."""
    import grain  # slow to import, and --help does not need it

    return grain.MapDataset.source(range(number))


def in_batches(
    order: "grain.MapDataset",
    read: Callable[[int], dict[str, Any]],
    local_size: int,
    canvas_shape: tuple[int, int, int],
    num_threads: int,
    chunk: int = _CHUNK,
) -> Iterator[Batch]:
    """Yields batches of records; threads read ahead and copy each image once, into its batch.

    Args:
      order: indices of the records; its length is a multiple of `local_size`.
      read: returns the record of an index: `pixels [h, w, C]` uint8, and integers or bools.
      local_size: b, records in a batch.
      canvas_shape: rows, columns and channels of a canvas; every image must fit.
      num_threads: number of reading threads.
      chunk: records that a thread reads per task.

    Yields: `canvas [b, *canvas_shape]` uint8, each image in the top left corner; `size [b, 2]`
      int32, height and width; and one array [b] for each integer or bool of the records.
    """
    starts = range(0, local_size, chunk)
    ahead = math.ceil(num_threads / len(starts))  # batches that keep all threads busy
    pending: collections.deque[tuple[np.ndarray, list[Future]]] = collections.deque()

    def fill(places: np.ndarray, first: int) -> list[dict[str, Any]]:
        return [_put(read(order[first + i]), place) for i, place in enumerate(places)]

    threads = ThreadPoolExecutor(max(1, num_threads), "read-images")
    try:
        for first in range(0, len(order), local_size):
            # Unused parts cost nothing: the system allocates a page of zeros at its first write.
            canvas = _blank((local_size, *canvas_shape))
            parts = [threads.submit(fill, canvas[i : i + chunk], first + i) for i in starts]
            pending.append((canvas, parts))
            if len(pending) > ahead:
                yield _collate(*pending.popleft())
        while pending:
            yield _collate(*pending.popleft())
    finally:
        threads.shutdown(cancel_futures=True)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.zeros(shape, np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: larger than the address space
        raise UsageError(
            f"a batch of canvases of shape {shape} needs {math.prod(shape) / 2**30:.1f} GiB, more "
            "memory than the host has: lower canvas_size or batch_size"
        ) from error


def _put(record: dict[str, Any], place: np.ndarray) -> dict[str, Any]:
    """Copies the pixels of a record to their place in the batch; returns the record's other values.

    `pixels` is replaced by `size`, their (height, width).
    """
    pixels = record.pop("pixels")
    place[: pixels.shape[0], : pixels.shape[1]] = pixels
    return {"size": pixels.shape[:2]} | record


def _collate(canvas: np.ndarray, parts: list[Future]) -> Batch:
    """Waits until the canvases are filled, and collects the batch."""
    records = [record for part in parts for record in part.result()]
    batch = {"canvas": canvas}
    for key, first in records[0].items():
        dtype = bool if isinstance(first, bool) else np.int32
        batch[key] = np.array([record[key] for record in records], dtype)
    return batch
