"""Batches of pictures, filled ahead by threads.

Dims: `b` pictures of this process's share of a batch, `C` channels.
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

# Records that a thread reads in one go: handing over costs as much as reading a small picture,
# and threads that trade the interpreter lock at every record are slower than one.
_CHUNK = 16


def counted(number: int) -> "grain.MapDataset":
    """The whole numbers below `number`, to be shuffled, cut and handed to `in_batches`."""
    import grain  # here: it is slow to import, and --help needs none

    return grain.MapDataset.source(range(number))


def in_batches(
    order: "grain.MapDataset",
    read: Callable[[int], dict[str, Any]],
    local_size: int,
    canvas_shape: tuple[int, int, int],
    num_threads: int,
    chunk: int = _CHUNK,
) -> Iterator[Batch]:
    """Batches of what `read` makes of an order, filled ahead by threads with one copy a picture.

    Args:
      order: of the indices; it ends with a whole batch.
      read: makes a record with `pixels [h, w, C]` uint8, and whole numbers or bools.
      local_size: b, records in a batch.
      canvas_shape: rows, columns and channels of the canvas that every picture fits on.
      num_threads: that read.
      chunk: records that a thread reads in one go.
    """
    starts = range(0, local_size, chunk)
    ahead = math.ceil(num_threads / len(starts))  # batches that keep all threads at work
    pending: collections.deque[tuple[np.ndarray, list[Future]]] = collections.deque()

    def fill(places: np.ndarray, first: int) -> list[dict[str, Any]]:
        return [_put(read(order[first + i]), place) for i, place in enumerate(places)]

    threads = ThreadPoolExecutor(max(1, num_threads), "read-images")
    try:
        for first in range(0, len(order), local_size):
            # Zeros that nothing is written to cost nothing: the system hands out such pages late.
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
    except (MemoryError, ValueError) as error:  # the latter beyond what an address can say
        raise UsageError(
            f"a batch of canvases of shape {shape} takes {math.prod(shape) / 2**30:.1f} GiB, which "
            "the host does not have: lower the canvas_size or the batch_size"
        ) from error


def _put(record: dict[str, Any], place: np.ndarray) -> dict[str, Any]:
    """Moves the pixels of a record to their place, and leaves their size in it."""
    pixels = record.pop("pixels")
    place[: pixels.shape[0], : pixels.shape[1]] = pixels
    return {"size": pixels.shape[:2]} | record


def _collate(canvas: np.ndarray, parts: list[Future]) -> Batch:
    """A batch of filled canvases; waits until they are."""
    records = [record for part in parts for record in part.result()]
    batch = {"canvas": canvas}
    for key, first in records[0].items():
        dtype = bool if isinstance(first, bool) else np.int32
        batch[key] = np.array([record[key] for record in records], dtype)
    return batch
