"""Standard streams whose failures do not end a command.

A terminal that is gone, a reader of a pipe that has exited, a full disk, a stream that was closed
before the program started: none of them may end a training run, or lose the results of a job.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class UnfailingStream:
    """A text stream that drops what cannot be written; otherwise like the wrapped stream.

    Args:
      stream: the stream to wrap; None, as Python sets a closed `sys.stderr`, drops everything.

    Attributes:
      failure: the last error, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = io.TextIOBase() if stream is None else stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Writes a text. Returns its length, also if it was dropped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except ValueError:  # the stream is closed or does not exist
            pass
        except OSError as error:
            self.failure = error
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self.failure = error
        except ValueError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    # tqdm clears a progress bar before it writes to an equal stream.
    def __eq__(self, other: object) -> bool:
        return self._stream == getattr(other, "_stream", other)

    def __hash__(self) -> int:
        return hash(self._stream)


@contextmanager
def unfailing_output() -> Iterator[tuple[UnfailingStream, UnfailingStream]]:
    """A context in which `sys.stdout` and `sys.stderr` are `UnfailingStream`s. Yields both."""
    for descriptor in range(3):  # a file opened later would get the number of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    wrapped = UnfailingStream(sys.stdout), UnfailingStream(sys.stderr)
    sys.stdout, sys.stderr = wrapped
    try:
        yield wrapped
    finally:
        sys.stdout, sys.stderr = before
        for stream in wrapped:
            stream.flush()
            if stream.failure:  # Python flushes it again at exit, which would fail
                with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
