"""Watches the other processes of a run, to say in plain words that one is gone.

JAX ends all processes when one of them is gone, with a C++ stack trace that does not say which one:
at once if process 0 is gone, otherwise after its heartbeat timeout.
"""

import atexit
import itertools
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import jax

BEAT_SECONDS = 5.0  # between two signs of life
SILENCE_SECONDS = 30.0  # before a process is reported; JAX itself waits 100 seconds
_ALIVE, _ENDED = "dino_jax/alive", "dino_jax/ended"  # followed by the number of a process


def watch_peers() -> None:
    """Starts a thread that reports processes without signs of life. Each is reported once.

    Call this after `jax.distributed.initialize`. If process 0 is gone, JAX ends the others within
    milliseconds, so the report may follow JAX's own message, and is
    sometimes missing.
    """
    from jax._src.distributed import global_state  # JAX has no public access to its key-value store

    client, index = global_state.client, jax.process_index()
    thread = threading.Thread(
        target=_watch, args=(client, index, global_state.coordinator_address), daemon=True
    )
    thread.start()

    def end() -> None:  # runs before JAX's own cleanup, which waits for the other processes
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_ENDED}/{index}", "", allow_overwrite=True)
            thread.join(BEAT_SECONDS)
            client.key_value_set(f"{_ALIVE}/{index}", "", allow_overwrite=True)

    atexit.register(end)


def _watch(client: Any, index: int, coordinator: str) -> None:
    last: dict[str, tuple[str, float]] = {}  # key: value, and when it was first seen
    for number in itertools.count():
        try:
            sign = f"{number} {socket.gethostname()}"
            client.key_value_set(f"{_ALIVE}/{index}", sign, allow_overwrite=True)
            _report_silent(dict(client.key_value_dir_get(_ALIVE)), last)
            client.blocking_key_value_get(f"{_ENDED}/{index}", int(1000 * BEAT_SECONDS))
            return  # this process is about to end
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # otherwise it is time for the next sign
                moment = time.strftime("%X")
                _report(f"the connection to process 0 ({coordinator}) was lost at {moment}")
                return


def _report_silent(found: dict[str, str], last: dict[str, tuple[str, float]]) -> None:
    """Reports the processes whose value has not changed for `SILENCE_SECONDS`."""
    now = time.time()
    for key, value in found.items():
        known, since = last.get(key, ("", now))
        if value != known:
            last[key] = value, now
        elif value and now - since > SILENCE_SECONDS:
            number, host = key.rpartition("/")[2], value.partition(" ")[2]
            moment = time.strftime("%X", time.localtime(since))
            _report(f"process {number} on {host} has been silent since {moment}")
            last[key] = value, float("inf")


def _report(problem: str) -> None:
    # Not with print or logging: another thread may be inside a write to the stream.
    text = (
        f"\nerror: {problem}, so JAX will end this process. Start all processes with the same "
        "command again to continue from the last checkpoint\n"
    )
    with suppress(OSError):
        os.write(2, text.encode())
