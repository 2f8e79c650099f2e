"""Distinguishes a damaged checkpoint from one that does not fit or cannot be read at the moment.

A damaged checkpoint is replaced by an older one, so the others must never be taken for damaged.
"""

import errno
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from dino_jax.errors import UsageError

# TensorStore reports these for files with wrong contents, and others for files it cannot read.
_DAMAGE_STATUSES = (
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "DATA_LOSS",
    "FAILED_PRECONDITION",
    "INVALID_ARGUMENT",
)


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or whose contents differ from what was saved."""


@contextmanager
def reading(step: int) -> Iterator[None]:
    """A context in which every error from a checkpoint's files is raised as one of two errors.

    Out-of-memory errors are neither, and pass through.

    Args:
      step: the checkpoint's step, for the message.
    Raises:
      DamagedCheckpoint: files are missing or have wrong contents.
      UsageError: files cannot be read at the moment.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax raises Exception itself if array data is missing
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        if _is_system_error(error):
            raise UsageError(
                f"the checkpoint of step {step} cannot be read at the moment ({reason}): check the "
                "file system and run the same command again"
            ) from error
        raise DamagedCheckpoint(
            f"the checkpoint of step {step} is incomplete or damaged ({reason})"
        ) from error


def storage_status(error: Exception) -> str | None:
    """The status at the start of a TensorStore error, which is a ValueError."""
    found = re.match(r"([A-Z_]+): ", str(error))
    return found[1] if found else None


def _is_system_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # in TensorStore errors
        return int(code[1]) != errno.ENOENT
    return storage_status(error) not in (None, *_DAMAGE_STATUSES)


def differences(found: Any, expected: Any) -> list[str]:
    """How two trees of arrays differ in names, shapes and dtypes, one phrase per array."""
    found, expected = _descriptions(found), _descriptions(expected)
    return [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]


def _descriptions(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array by its name."""

    def key(part: Any) -> str:
        return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))

    return {
        ".".join(map(key, path)): f"{x.dtype} {list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
