"""Batches are moved to the devices ahead of time, and no thread is left running."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from jax.sharding import NamedSharding

from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.sharding import batch_sharded, make_mesh
from tests.support.scripts import run_script


@pytest.fixture
def sharding() -> NamedSharding:
    return batch_sharded(make_mesh())


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert not set(threading.enumerate()) - before


def numbered(count: int | None = None, made: list[int] | None = None) -> Iterator[dict]:
    for number in itertools.count() if count is None else range(count):
        if made is not None:
            made.append(number)
        canvas = np.full((16, 2, 2, 3), number, np.uint8)
        yield {"canvas": canvas, "index": np.arange(16, dtype=np.int32) + 16 * number}


def test_batches_arrive_in_order_on_all_devices(sharding: NamedSharding) -> None:
    with DevicePrefetch(numbered(5), sharding) as batches:
        arrived = list(batches)
    for number, batch in enumerate(arrived):
        assert set(batch) == {"canvas", "index"}
        for array in batch.values():
            assert array.sharding.is_equivalent_to(sharding, array.ndim)
            assert len(array.addressable_shards) == 8
        np.testing.assert_array_equal(batch["index"], np.arange(16) + 16 * number)
        assert (batch["canvas"] == number).all()
    assert len(arrived) == 5


def test_raises_stop_iteration_repeatedly_at_the_end(sharding: NamedSharding) -> None:
    batches = DevicePrefetch(numbered(1), sharding)
    next(batches)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(batches)


def test_runs_ahead_but_not_further(sharding: NamedSharding) -> None:
    made = []
    with DevicePrefetch(numbered(made=made), sharding, size=3) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) == 5  # one returned, three on the devices, one waiting for its place


def test_waiting_is_measured(sharding: NamedSharding) -> None:
    def slow() -> Iterator[dict]:
        for batch in numbered(3):
            time.sleep(0.1)
            yield batch

    with DevicePrefetch(slow(), sharding) as batches:
        list(batches)
        assert 0.2 < batches.wait_seconds < 3
    with DevicePrefetch(numbered(3), sharding) as batches:
        for _ in range(3):
            time.sleep(0.1)  # a step
            next(batches)
        assert batches.wait_seconds < 0.2


def test_an_error_is_raised_after_the_batches_before_it(sharding: NamedSharding) -> None:
    def failing() -> Iterator[dict]:
        yield from numbered(2)
        raise OSError("the disk is gone")

    batches = DevicePrefetch(failing(), sharding)
    assert (next(batches)["canvas"] == 0).all()
    assert (next(batches)["canvas"] == 1).all()
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_that_does_not_fit_the_devices(sharding: NamedSharding) -> None:
    with (
        DevicePrefetch(iter([{"index": np.arange(7)}]), sharding) as batches,
        pytest.raises(ValueError, match="7"),
    ):
        next(batches)


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_leaving_early_ends_thread_and_source(sharding: NamedSharding, taken: int) -> None:
    source = numbered()
    with DevicePrefetch(source, sharding) as batches:
        for _ in range(taken):
            next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(StopIteration):
        next(source)  # it has been closed
    batches.close()


def test_an_error_in_the_loop_ends_the_thread(sharding: NamedSharding) -> None:
    def loop() -> None:
        with DevicePrefetch(numbered(), sharding) as batches:
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def test_an_abandoned_iterator_ends_its_thread(sharding: NamedSharding) -> None:
    batches = DevicePrefetch(numbered(), sharding)
    next(batches)
    del batches  # the fixture checks that the thread ends


def test_the_interpreter_can_exit_while_batches_are_read() -> None:
    script = """
import itertools, jax, numpy as np
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.sources import open_source
records = Records(open_source("shapes:64"))
batches = DevicePrefetch(
    train_batches(records, batch_size=32, seed=0, start_step=0, canvas_size=64, num_threads=2),
    jax.sharding.SingleDeviceSharding(jax.devices()[0]),
)
print(next(batches)["canvas"].shape)
"""
    assert run_script(script) == (0, "(32, 64, 64, 3)\n", "")
