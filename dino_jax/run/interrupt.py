"""Ctrl-C and SIGTERM as a request that a loop honours between two steps."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signal_name`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        # Not by print: a handler must not enter a stream that the main thread is writing to.
        os.write(
            2, f"\n{self.signal_name}: saves after this step; again to stop at once\n".encode()
        )

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agreed(self, step: int, *, every: tuple[int, ...]) -> bool:
        """Whether to stop after this step, the same on every host.

        Args:
          step: steps finished.
          every: several hosts confer at multiples of these only, since that makes them wait.
        """
        if jax.process_count() == 1:
            return self.signal_name is not None
        if all(step % number for number in every):
            return False
        return bool(multihost_utils.process_allgather(np.asarray(bool(self.signal_name))).any())
