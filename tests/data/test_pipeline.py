"""Training batches depend on the seed and the step only, not on threads or processes."""

import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pipeline import Records, train_batches
from dino_jax.errors import UsageError
from tests.support.numbered_images import Numbers, assert_no_threads_left, indices, train


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


def test_larger_images_are_shrunk_to_the_canvas() -> None:
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


def test_a_batch_never_contains_two_epochs() -> None:
    """52 images make 6 batches of 8; the 4 images that are left out vary."""
    epochs = indices(train(Numbers(52)), 6 * 20).reshape(20, 48)
    left_out = [set(range(52)) - set(epoch) for epoch in epochs.tolist()]
    assert {len(left) for left in left_out} == {4}  # so no index occurs twice in an epoch
    assert len(set.union(*left_out)) > 30


def test_seeds_differ() -> None:
    orders = [indices(train(Numbers(48), seed=seed), 6) for seed in (0, 1, 2)]
    assert (orders[0] != orders[1]).any()
    assert (orders[1] != orders[2]).any()
    np.testing.assert_array_equal(orders[0], indices(train(Numbers(48), seed=0), 6))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 20])
def test_a_start_at_a_later_step_gives_the_same_batches(start: int) -> None:
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
    assert len(read) <= 4 * 512  # this batch, and those read ahead
    step = 10**6 % (1_300_000 // 512)
    first_of_epoch = indices(train(Numbers(1_300_000), batch_size=512, start_step=10**6 - step), 1)
    assert (first_of_epoch != late).any()


@pytest.mark.parametrize("num_threads", [0, 1, 3, 16])
def test_threads_do_not_change_the_order(num_threads: int) -> None:
    def slow(index: int) -> Image.Image:
        time.sleep(0.0005 * (index % 3))  # some images take longer than others
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
def test_invalid_settings_are_rejected_before_the_first_batch(
    settings: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(Numbers(100), **settings)


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    batches = train(Numbers(100), num_threads=4)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert_no_threads_left(before)


def test_a_batch_larger_than_the_hosts_memory() -> None:
    records = Records(Numbers(16))
    batches = train_batches(
        records, batch_size=16, seed=0, start_step=0, canvas_size=10**7, num_threads=1
    )
    with pytest.raises(UsageError, match=r"shape \(16, 10000000, .* GiB, .* lower canvas_size"):
        next(batches)
