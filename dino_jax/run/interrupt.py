"""Turns Ctrl-C and SIGTERM into a stop request that a loop checks between steps."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Records SIGINT and SIGTERM in `signal_name`, as a context manager.

    Only the first signal is recorded; it restores the previous handlers.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        # Not with print: the signal may interrupt the main thread inside a write to the stream.
        text = f"\n{self.signal_name}: saving after this step; repeat to stop immediately\n"
        os.write(2, text.encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def should_stop(self, step: int, *, every: tuple[int, ...]) -> bool:
        """Whether to stop after this step. All hosts get the same answer.

        Args:
          step: the number of finished steps.
          every: with several hosts, they communicate only at multiples of these numbers, because
            that makes them wait for each other. In between, the answer is False.
        """
        if jax.process_count() == 1:
            return self.signal_name is not None
        if all(step % number for number in every):
            return False
        return bool(multihost_utils.process_allgather(np.asarray(bool(self.signal_name))).any())
