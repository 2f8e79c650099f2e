"""Watches the other processes of a run, and reports in one line which of them is gone.

JAX ends all processes when one of them is gone, with a C++ stack trace that does not name it: at
once if process 0 is gone, otherwise after its heartbeat timeout.
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
    """Starts a thread that reports, once each, the processes that ended or give no sign of life.

    Call this after `jax.distributed.initialize`. If process 0 is killed, JAX ends the others within
    milliseconds, so the report may follow JAX's own message or be missing.
    """
    from jax._src.distributed import global_state  # JAX has no public access to its key-value store

    client, index, host = global_state.client, jax.process_index(), socket.gethostname()
    thread = threading.Thread(
        target=_watch, args=(client, index, host, global_state.coordinator_address), daemon=True
    )
    thread.start()

    def end() -> None:  # runs before JAX's own cleanup, which waits for the other processes
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_ENDED}/{index}", "", allow_overwrite=True)
            thread.join(BEAT_SECONDS)
            client.key_value_set(f"{_ALIVE}/{index}", f"ended {host}", allow_overwrite=True)

    atexit.register(end)


def _watch(client: Any, index: int, host: str, coordinator: str) -> None:
    last: dict[str, tuple[str | None, float]] = {}  # key: value, and when it was first seen
    for number in itertools.count():
        try:
            client.key_value_set(f"{_ALIVE}/{index}", f"{number} {host}", allow_overwrite=True)
            _report_silent(dict(client.key_value_dir_get(_ALIVE)), last)
            client.blocking_key_value_get(f"{_ENDED}/{index}", int(1000 * BEAT_SECONDS))
            return  # this process is about to end
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # otherwise it is time for the next sign
                moment = time.strftime("%X")
                _report(f"error: the connection to process 0 ({coordinator}) was lost at {moment}")
                return


def _report_silent(found: dict[str, str], last: dict[str, tuple[str | None, float]]) -> None:
    """Reports the processes whose value has not changed for `SILENCE_SECONDS`.

    A process that ended normally is reported, too, because its end cannot be told from an error.
    """
    now = time.time()
    for key, value in found.items():
        known, since = last.get(key, (None, now))
        if value != known:
            last[key] = value, now
        elif now - since > SILENCE_SECONDS:
            sign, _, host = value.partition(" ")
            process = f"process {key.rpartition('/')[2]} on {host}"
            moment = time.strftime("%X", time.localtime(since))
            if sign == "ended":
                _report(f"warning: {process} ended at {moment}, and this process still runs")
            else:
                _report(f"error: {process} has been silent since {moment}")
            last[key] = value, float("inf")


def _report(problem: str) -> None:
    # Not with print or logging: another thread may be inside a write to the stream.
    text = (
        f"\n{problem}. If JAX ends this process, start all processes with the same command again "
        "to continue from the last checkpoint\n"
    )
    with suppress(OSError):
        os.write(2, text.encode())
