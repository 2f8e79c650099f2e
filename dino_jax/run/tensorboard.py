"""Writes scalars for TensorBoard, flushed after every call.

tensorboardX's `SummaryWriter` writes in a background thread that can only be waited for by closing
it. If a run is killed, scalars from before its last checkpoint could be lost, and the resumed run
does not write them again.
"""

import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class ScalarWriter:
    """Adds an event file to a folder; use as a context manager.

    Args:
      folder: created if missing.
      purge_step: TensorBoard hides earlier events in the folder from this step on.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        # Imported here, because tensorboardX imports torch if it is installed.
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        log = event_pb2.SessionLog
        self._add(step=purge_step, session_log=log(status=log.START))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Adds the values of a step as `GROUP/NAME`; NaN and infinities are skipped."""
        scalars = [
            self._summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        self._add(step=step, summary=self._summary(value=scalars))

    def _add(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._file.write(event.SerializeToString())
        self._file.flush()
