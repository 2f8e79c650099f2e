"""Unreadable images, and their replacement in training."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from tests.support.numbered_images import Numbers, indices, train


def test_the_next_readable_image_replaces_an_unreadable_one() -> None:
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
def test_stops_if_too_many_are_unreadable(count: int, share: float, allowed: int) -> None:
    def run(number: int) -> Records:
        records = Records(Numbers(count, frozenset(range(number))), max_unreadable=share)
        indices(train(records, batch_size=10), count // 10)
        return records

    assert run(allowed).num_unreadable == allowed
    with pytest.raises(UsageError, match=rf"{allowed + 1} of the {count} .* allows {allowed};"):
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
