"""The error types for what a user can put right: a wrong setting, path or file."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A wrong setting, path or file; the message names the value, the rule and the way out.

    Commands print it as one line and exit with code 2. Anything else that escapes, but for the
    system's own errors, is a bug and keeps its traceback.
    """


class TorchFileError(UsageError):
    """A `.pth` file that is missing, damaged, foreign, or more than plain data and tensors."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Begins the message of a wrong usage with what it is about, such as a file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
