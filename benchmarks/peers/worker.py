"""A process for each side of a comparison, so that none disturbs another's runtime."""

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from peers.task import Side


class Worker:
    """A process that holds one side and calls its methods."""

    _side: Side  # in that process

    def __init__(self, open_side: Callable[..., Side], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._pool.submit(Worker._open, open_side, args).result()

    @classmethod
    def _open(cls, open_side: Callable[..., Side], args: tuple[Any, ...]) -> None:
        cls._side = open_side(*args)

    @classmethod
    def _call(cls, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(cls._side, method)(*args, **kwargs)

    def start(self, method: str, *args: Any, **kwargs: Any) -> Future:
        """Begins a call."""
        return self._pool.submit(Worker._call, method, args, kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the method returns."""
        return self.start(method, *args, **kwargs).result()
