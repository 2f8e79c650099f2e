"""Evaluation batches contain every image once, in order."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import resize_and_crop
from dino_jax.data.pipeline import Batch, Records, eval_batches
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from tests.support.numbered_images import Numbers, assert_no_threads_left, train


def evaluate(source: Numbers | Records, **settings: object) -> Iterator[Batch]:
    records = source if isinstance(source, Records) else Records(source)
    defaults = {"batch_size": 8, "canvas_size": 5, "resize": 4, "crop": 2, "num_threads": 2}
    return eval_batches(records, **defaults | settings)


def test_eval_is_in_order_and_padded() -> None:
    batches = list(evaluate(Numbers(19)))
    assert [batch["canvas"].shape for batch in batches] == [(8, 5, 5, 3)] * 3
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.dtype == bool
    np.testing.assert_array_equal(valid, np.arange(24) < 19)
    joined = {key: np.concatenate([b[key] for b in batches])[valid] for key in batches[0]}
    np.testing.assert_array_equal(joined["index"], np.arange(19))
    np.testing.assert_array_equal(joined["label"], np.arange(19) % 7)
    np.testing.assert_array_equal(joined["canvas"][:, 0, 0, 0], np.arange(19))
    np.testing.assert_array_equal(joined["size"][:, 0], 2 + np.arange(19) % 3)
    assert not joined["done"].any()
    np.testing.assert_array_equal(batches[-1]["index"][3:], -1)


@pytest.mark.parametrize("count", [16, 1])
def test_eval_of_full_and_of_incomplete_batches(count: int) -> None:
    batches = list(evaluate(Numbers(count)))
    assert len(batches) == -(-count // 8)
    assert sum(batch["valid"].sum() for batch in batches) == count


def test_eval_marks_unreadable_images_as_invalid() -> None:
    records = Records(Numbers(20, frozenset({0, 7, 19})))
    batches = list(evaluate(records))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [0, 7, 19, 20, 21, 22, 23]
    assert records.num_unreadable == 3
    assert batches[0]["index"][7] == 7
    assert batches[0]["canvas"][7].max() == 0
    assert (batches[0]["size"] > 0).all()


def test_eval_resizes_large_images_on_the_host(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (33, 20), (32, 32), (20, 90)]
    for number, size in enumerate(sizes):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    (batch,) = evaluate(Records(source), canvas_size=32, resize=24, crop=20, batch_size=4)
    assert batch["done"].tolist() == [True, True, False, True]
    assert batch["size"].tolist() == [[20, 20], [20, 20], [32, 32], [20, 20]]
    for index in (0, 1, 3):
        expected = resize_and_crop(source.image(index), 24, 20)
        np.testing.assert_array_equal(batch["canvas"][index, :20, :20], expected)
        assert batch["canvas"][index, 20:].max() == batch["canvas"][index, :, 20:].max() == 0
    np.testing.assert_array_equal(batch["canvas"][2], np.asarray(source.image(2)))


@pytest.mark.parametrize("processes", [2, 4])
def test_eval_processes_share_the_batches(processes: int) -> None:
    whole = list(evaluate(Numbers(19)))
    for p in range(processes):
        part = list(evaluate(Numbers(19), process_index=p, process_count=processes))
        for expected, batch in zip(whole, part, strict=True):
            for key, value in expected.items():
                np.testing.assert_array_equal(batch[key], value[p::processes])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 6, "resize": 8}, "crop=6 must not exceed canvas_size=5"),
        ({"crop": 5, "resize": 4}, "or resize=4"),
        ({"process_count": 3}, "not divisible"),
    ],
)
def test_eval_rejects_invalid_sizes(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Numbers(10), **settings)


@pytest.mark.parametrize("make", [train, evaluate])
def test_nothing_is_read_before_the_first_batch(make: Callable[..., Iterator[Batch]]) -> None:
    before = set(threading.enumerate())
    batches = make(Numbers(50))
    assert_no_threads_left(before)
    next(batches)
    batches.close()
    assert_no_threads_left(before)
