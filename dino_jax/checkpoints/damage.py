"""Tells a checkpoint that is damaged from one that the machine cannot read now.

The first is given up for an older one, so the second must never be taken for it.
"""

import errno
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from dino_jax.errors import UsageError

# With these TensorStore refuses what the files hold; with others it could not read them.
_OF_DAMAGED_FILES = (
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "DATA_LOSS",
    "FAILED_PRECONDITION",
    "INVALID_ARGUMENT",
)


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not whole, or holds other arrays than were saved."""


@contextmanager
def reading(step: int) -> Iterator[None]:
    """While entered, whatever is raised of a checkpoint's files becomes one of two errors.

    Memory that runs out is neither, and passes.

    Args:
      step: of the checkpoint, for the message.
    Raises:
      DamagedCheckpoint: its files are missing, or hold something else.
      UsageError: they cannot be read now.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax raises that class itself where array data is missing
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        if _is_of_the_machine(error):
            raise UsageError(
                f"checkpoint of step {step} cannot be read now ({reason}): see to the file system "
                "and run the same command"
            ) from error
        raise DamagedCheckpoint(f"checkpoint of step {step} is not whole: {reason}") from error


def storage_status(error: Exception) -> str | None:
    """The status that TensorStore's errors, which are of class ValueError, begin with."""
    found = re.match(r"([A-Z_]+): ", str(error))
    return found[1] if found else None


def _is_of_the_machine(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's, too
        return int(code[1]) != errno.ENOENT
    return storage_status(error) not in (None, *_OF_DAMAGED_FILES)
