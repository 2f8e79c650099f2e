"""A source whose images encode their index, and its training batches."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dino_jax.data.decode import UnreadableImage
from dino_jax.data.pipeline import Batch, Records, train_batches


@dataclasses.dataclass
class Numbers:
    """A source in which image i has grey level i % 256, height 2 + i % 3 and width 3 + i % 2."""

    count: int
    broken: frozenset[int] = frozenset()
    class_names = None

    spec = "numbers:test"

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage("broken on purpose")
        return Image.new("L", (3 + index % 2, 2 + index % 3), index % 256)

    def label(self, index: int) -> int:
        return index % 7

    def name(self, index: int) -> str:
        return f"number {index}"


def train(source: Numbers | Records, **settings: object) -> Iterator[Batch]:
    """Training batches, by default of eight images."""
    records = source if isinstance(source, Records) else Records(source)
    defaults = {"batch_size": 8, "seed": 3, "start_step": 0, "canvas_size": 5, "num_threads": 2}
    return train_batches(records, **defaults | settings)


def indices(batches: Iterator[Batch], number: int) -> np.ndarray:
    """The indices of the images in the next batches."""
    return np.stack([batch["index"] for batch in itertools.islice(batches, number)])


def assert_no_threads_left(before: set[threading.Thread]) -> None:
    """Waits until all threads that are not in `before` have ended."""
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
