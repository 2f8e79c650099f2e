"""Moves batches to the devices in a thread, ahead of the step that uses them."""

import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Self

import jax
import numpy as np


class DevicePrefetch(Iterator[dict[str, jax.Array]]):
    """Iterates over batches as global arrays on the devices, up to `size` batches ahead.

    An exception in `batches` is raised by the `next` that would have returned the failed batch. The
    thread ends after the last batch, at `close`, at the end of a `with` block, or when this object
    is garbage-collected, whichever comes first; if `batches` is a generator, it is then closed.

    Attributes:
      wait_seconds: total time that `next` has waited for batches.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        sharding: jax.sharding.Sharding,
        size: int = 2,
    ) -> None:
        """Starts the thread.

        Args:
          batches: this process's share of each batch, arrays [b, ...].
          sharding: sharding of every array's first axis, over the devices of all processes.
          size: batches kept on the devices in addition to the one in use.
        """
        self.wait_seconds = 0.0
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Semaphore(size)
        stop = threading.Event()
        # The thread must not refer to `self`, or an abandoned iterator would never be collected.
        thread = threading.Thread(
            target=_produce,
            args=(batches, sharding, self._ready, self._free, stop),
            name="prefetch-to-device",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut_down, thread, self._free, stop)
        thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if not self._finalizer.alive:
            raise StopIteration
        start = time.perf_counter()
        batch, error = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        self._free.release()
        if batch is None:
            self.close()
            raise error
        return batch

    def close(self) -> None:
        """Stops the thread and waits for it; later calls of `next` raise StopIteration."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _produce(
    batches: Iterator[dict[str, np.ndarray]],
    sharding: jax.sharding.Sharding,
    ready: queue.SimpleQueue,
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Puts (batch, None) for each batch, and finally (None, the exception that ended them)."""
    try:
        for batch in batches:
            free.acquire()
            if stop.is_set():
                break
            place = jax.make_array_from_process_local_data
            ready.put(({key: place(sharding, value) for key, value in batch.items()}, None))
        ready.put((None, StopIteration()))
    except BaseException as error:  # not swallowed: `next` raises it
        ready.put((None, error))
    finally:
        if isinstance(batches, Generator):
            batches.close()


def _shut_down(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    free.release()
    if thread is not threading.current_thread():  # garbage collection may run in any thread
        thread.join()
