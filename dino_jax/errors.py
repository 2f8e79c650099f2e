"""Errors that a user can fix: a wrong setting, path or file."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice


class UsageError(ValueError):
    """A wrong setting, path or file; the message names the value, the rule and the way out.

    Commands print it as one line and exit with code 2. Any other exception, except for errors of
    the operating system, is a bug and keeps its traceback.
    """


class TorchFileError(UsageError):
    """A `.pth` file that is missing, damaged, foreign, or more than plain data and tensors."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Prefixes the message of a `UsageError` with its subject, such as a file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def listed(items: Collection[object], limit: int = 5) -> str:
    """The first items for a message: "a, b, c, d, e and 3 more"."""
    text = ", ".join(str(item) for item in islice(items, limit))
    return f"{text} and {len(items) - limit} more" if len(items) > limit else text
