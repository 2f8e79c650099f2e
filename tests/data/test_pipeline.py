"""Batches are a function of the seed and the step, whatever reads them."""

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage, resize_and_crop
from dino_jax.data.pipeline import Batch, Records, eval_batches, train_batches
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError


@dataclasses.dataclass
class Numbers:
    """Record i is a picture of grey level i % 256 and size (2 + i % 3, 3 + i % 2)."""

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
    records = source if isinstance(source, Records) else Records(source)
    defaults = {"batch_size": 8, "seed": 3, "start_step": 0, "canvas_size": 5, "num_threads": 2}
    return train_batches(records, **defaults | settings)


def indices(batches: Iterator[Batch], number: int) -> np.ndarray:
    return np.stack([batch["index"] for batch in itertools.islice(batches, number)])


def assert_no_threads_left(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


# --- training ---


def test_batch_entries() -> None:
    batch = next(train(Numbers(100)))
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "canvas": ("uint8", (8, 5, 5, 3)),
        "size": ("int32", (8, 2)),
        "index": ("int32", (8,)),
        "label": ("int32", (8,)),
    }
    for canvas, (height, width), index, label in zip(*batch.values(), strict=True):
        assert (height, width, label) == (2 + index % 3, 3 + index % 2, index % 7)
        expected = np.zeros((5, 5, 3), np.uint8)
        expected[:height, :width] = index
        np.testing.assert_array_equal(canvas, expected)


def test_grey() -> None:
    batch = next(train(Records(Numbers(100), channels=1)))
    assert batch["canvas"].shape == (8, 5, 5, 1)
    np.testing.assert_array_equal(batch["canvas"][:, 0, 0, 0], batch["index"])


def test_larger_pictures_are_shrunk_to_the_canvas() -> None:
    batch = next(train(Numbers(100), canvas_size=2))
    assert batch["canvas"].shape == (8, 2, 2, 3)
    np.testing.assert_array_equal(batch["size"].max(axis=1), 2)
    np.testing.assert_array_equal(batch["canvas"][:, 0, 0, 0], batch["index"])


def test_every_epoch_is_a_new_permutation() -> None:
    epochs = indices(train(Numbers(48)), 6 * 5).reshape(5, 48)
    for epoch in epochs:
        assert sorted(epoch) == list(range(48))
    assert len(np.unique(epochs, axis=0)) == 5
    assert (epochs == np.arange(48)).mean() < 0.2


def test_a_batch_never_holds_two_epochs() -> None:
    """52 records make 6 batches of 8; the other 4 are left out, not always the same."""
    epochs = indices(train(Numbers(52)), 6 * 20).reshape(20, 48)
    left_out = [set(range(52)) - set(epoch) for epoch in epochs.tolist()]
    assert {len(left) for left in left_out} == {4}  # so no index came twice in an epoch
    assert len(set.union(*left_out)) > 30


def test_seeds_differ() -> None:
    orders = [indices(train(Numbers(48), seed=seed), 6) for seed in (0, 1, 2)]
    assert (orders[0] != orders[1]).any()
    assert (orders[1] != orders[2]).any()
    np.testing.assert_array_equal(orders[0], indices(train(Numbers(48), seed=0), 6))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 20])
def test_starts_where_an_uninterrupted_run_would_be(start: int) -> None:
    whole = list(itertools.islice(train(Numbers(50)), 26))
    resumed = train(Numbers(50), start_step=start, num_threads=1)
    for expected, batch in zip(whole[start:], resumed, strict=False):
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value)


def test_a_late_start_reads_no_earlier_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    read, image = [], Numbers.image
    monkeypatch.setattr(Numbers, "image", lambda self, i: read.append(i) or image(self, i))
    batches = train(Numbers(1_300_000), batch_size=512, start_step=10**6)
    late = next(batches)["index"]
    assert len(set(late.tolist())) == 512
    assert len(read) <= 4 * 512  # this batch, and those that are under way
    step = 10**6 % (1_300_000 // 512)
    first_of_epoch = indices(train(Numbers(1_300_000), batch_size=512, start_step=10**6 - step), 1)
    assert (first_of_epoch != late).any()


@pytest.mark.parametrize("num_threads", [0, 1, 3, 16])
def test_threads_do_not_change_the_order(num_threads: int) -> None:
    def slow(index: int) -> Image.Image:
        time.sleep(0.0005 * (index % 3))  # some records take longer than others
        return Image.new("L", (2, 2), index)

    source = Numbers(64)
    expected = indices(train(source, batch_size=32), 6)
    source.image = slow
    np.testing.assert_array_equal(
        indices(train(source, batch_size=32, num_threads=num_threads), 6), expected
    )


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_same_batches(processes: int) -> None:
    whole = indices(train(Numbers(50), start_step=4), 10)
    parts = [
        indices(train(Numbers(50), start_step=4, process_index=p, process_count=processes), 10)
        for p in range(processes)
    ]
    for p, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[:, p::processes])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 101}, "batch_size=101 is larger than the 100 images in numbers:test"),
        ({"process_count": 3}, "batch_size=8 is not divisible by the 3 processes"),
    ],
)
def test_refusals_come_at_once(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(Numbers(100), **settings)


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    batches = train(Numbers(100), num_threads=4)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert_no_threads_left(before)


# --- unreadable records ---


def test_the_next_readable_record_stands_in() -> None:
    broken = frozenset({5, 6, 7, 49})
    clean = indices(train(Numbers(50)), 12)
    records = Records(Numbers(50, broken))
    for expected, batch in zip(clean, train(records), strict=False):
        replaced = [{5: 8, 6: 8, 7: 8, 49: 0}.get(i, i) for i in expected.tolist()]
        np.testing.assert_array_equal(batch["index"], replaced)
        np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
        np.testing.assert_array_equal(batch["canvas"][:, 0, 0, 0], batch["index"])
    assert records.num_unreadable == 4


@pytest.mark.parametrize("num_threads", [1, 8])
def test_each_is_logged_and_counted_once(
    caplog: pytest.LogCaptureFixture, num_threads: int
) -> None:
    records = Records(Numbers(40, frozenset({3, 4, 20})))
    with caplog.at_level(logging.WARNING):
        indices(train(records, num_threads=num_threads), 25)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "unreadable image number 20: broken on purpose",
        "unreadable image number 3: broken on purpose",
        "unreadable image number 4: broken on purpose",
    ]
    assert records.num_unreadable == 3


@pytest.mark.parametrize(
    ("count", "share", "allowed"), [(100, 0.05, 10), (400, 0.05, 20), (100, 0.0, 10), (50, 0.5, 25)]
)
def test_stops_past_the_bound(count: int, share: float, allowed: int) -> None:
    def run(number: int) -> Records:
        records = Records(Numbers(count, frozenset(range(number))), max_unreadable=share)
        indices(train(records, batch_size=10), count // 10)
        return records

    assert run(allowed).num_unreadable == allowed
    with pytest.raises(UsageError, match=rf"{allowed + 1} of the {count} .* the {allowed} that"):
        run(allowed + 1)


def test_a_small_source_without_a_readable_image() -> None:
    with pytest.raises(UsageError, match="none of the 9 images in numbers:test can be read"):
        next(train(Numbers(9, frozenset(range(9)))))


def test_bad_files_in_a_folder(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:50])
    (tmp_path / "05.jpg").write_text("<!DOCTYPE html><title>404</title>")
    records = Records(open_source(str(tmp_path)))
    batch = next(
        train_batches(records, batch_size=13, seed=0, start_step=0, canvas_size=6, num_threads=2)
    )
    numbers = sorted(batch["canvas"][:, 0, 0, 0].tolist())
    assert numbers == [0, 1, 2, 4, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert records.num_unreadable == 2


def test_other_errors_are_not_swallowed() -> None:
    source = Numbers(50)

    def fail(_: int) -> Image.Image:
        raise MemoryError

    source.image = fail
    with pytest.raises(MemoryError):
        next(train(source))


# --- evaluation ---


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
def test_eval_of_few_or_full_batches(count: int) -> None:
    batches = list(evaluate(Numbers(count)))
    assert len(batches) == -(-count // 8)
    assert sum(batch["valid"].sum() for batch in batches) == count


def test_eval_drops_what_cannot_be_read() -> None:
    records = Records(Numbers(20, frozenset({0, 7, 19})))
    batches = list(evaluate(records))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [0, 7, 19, 20, 21, 22, 23]
    assert records.num_unreadable == 3
    assert batches[0]["index"][7] == 7
    assert batches[0]["canvas"][7].max() == 0
    assert (batches[0]["size"] > 0).all()


def test_eval_resizes_large_pictures_on_the_host(tmp_path: Path) -> None:
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
        ({"crop": 5, "resize": 4}, "nor resize=4"),
        ({"process_count": 3}, "not divisible"),
    ],
)
def test_eval_refusals(settings: dict[str, int], message: str) -> None:
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


def test_a_batch_that_the_host_has_no_memory_for() -> None:
    records = Records(Numbers(16))
    batches = train_batches(
        records, batch_size=16, seed=0, start_step=0, canvas_size=10**7, num_threads=1
    )
    with pytest.raises(UsageError, match=r"shape \(16, 10000000, .* GiB, .* lower the canvas_size"):
        next(batches)
