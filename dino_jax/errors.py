"""Errors that a user can fix: a wrong setting, path or file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A wrong setting, path or file. The message names the value, the rule and the way out.

    Commands print the message in one line and exit with code 2. Any other exception, except errors
    of the operating system, is a bug and is shown with its traceback.
    """


class TorchFileError(UsageError):
    """A `.pth` file that is missing or damaged, or contains more than plain data and tensors."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Prefixes the message of a `UsageError` with what it is about, such as a file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def listed(items: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """The first items for a message: "a, b, c, d, e and 3 more"."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more
