"""A process for each side of a comparison, so that none disturbs another's runtime."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from peers.task import Side


def share_gpu(processes: int) -> None:
    """Gives JAX in each of so many processes an equal part of a GPU, unless the user has said."""
    from dino_jax.run.out_of_memory import FRACTIONS  # not in PyTorch's process

    if not any(map(os.environ.get, FRACTIONS)):
        os.environ[FRACTIONS[0]] = f"{0.9 / processes:.2f}"


def _end_with_parent() -> None:
    """However the parent ends: a pool waits for its processes only where that can still wait."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


class Worker:
    """A process that holds one side and calls its methods."""

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
        """What the method returns."""
        return self._pool.submit(Worker._call, method, args, kwargs).result()
