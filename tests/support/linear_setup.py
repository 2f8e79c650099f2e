"""A small linear probe for the tests of linear classifiers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dino_jax.evaluate.classification import linear_training
from dino_jax.evaluate.features.extractor import Extraction

OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=32, num_threads=2)
TEST = "shapes:40@test"
TRAIN = {"train": "shapes:80@train", "epochs": 4, "train_batch_size": 32, "options": OPTIONS}
RATES = (0.01, 1.0)


@contextmanager
def interrupted_after(epochs: int) -> Iterator[None]:
    """Interrupts training within this context after it has saved that many epochs."""
    write = linear_training._write

    def write_and_stop(workdir: Path, settings: Any, progress: Any) -> None:
        write(workdir, settings, progress)
        if len(progress.history) == epochs:
            raise KeyboardInterrupt

    with (
        mock.patch.object(linear_training, "_write", write_and_stop),
        pytest.raises(KeyboardInterrupt),
    ):
        yield
