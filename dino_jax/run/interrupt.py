"""Turns signals into a stop request that a loop checks between steps."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Records the first of `SIGNALS` in `signal_name`, as a context manager.

    A second SIGINT or SIGTERM has its previous effect; further signals of other kinds are ignored,
    because terminals and schedulers send several. Signals that were ignored before, as by `nohup`,
    stay ignored. In a thread that is not the main one, no signal is recorded, because Python runs
    handlers in the main thread only.
    """

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
        if hasattr(signal, name)  # not all systems have all of them
    )
    REPEATABLE = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # None: a handler that was not installed by Python, and cannot be restored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeat = ""
        if number in self.REPEATABLE:
            signal.signal(number, self._previous[number])
            repeat = "; repeat to stop immediately"
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            # Not with print: the signal may interrupt the main thread inside a write to the stream.
            with suppress(OSError):
                os.write(2, f"\n{self.signal_name}: saving after this step{repeat}\n".encode())

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
