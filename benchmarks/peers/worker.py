"""A process for each side of a comparison, so that their runtimes do not interfere."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from peers.task import Side

# The current and the deprecated name; JAX rejects both together.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def share_gpu(processes: int) -> None:
    """Gives JAX in each process an equal part of a GPU's memory, unless the user chose one."""
    if not any(map(os.environ.get, FRACTIONS)):
        os.environ[FRACTIONS[0]] = f"{0.9 / processes:.2f}"


def _end_with_parent() -> None:
    """Ends this process with its parent, also if the parent is killed."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


class Worker:
    """A process that creates one side and calls its methods."""

    _side: Side  # in that process

    def __init__(self, open_side: Callable[..., Side], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent)
        self._pool.submit(Worker._open, open_side, args).result()

    @classmethod
    def _open(cls, open_side: Callable[..., Side], args: tuple[Any, ...]) -> None:
        cls._side = open_side(*args)

    @classmethod
    def _call(cls, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(cls._side, method)(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the side and returns its result."""
        return self._pool.submit(Worker._call, method, args, kwargs).result()
