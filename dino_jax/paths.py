"""Paths from users: `~` is expanded, and addresses of remote storage are rejected."""

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from dino_jax.errors import UsageError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` shortens gs://a to gs:/a


def local_path(path: str | os.PathLike[str], option: str) -> Path:
    """The local path that a user means. Only `~` and `~user` are expanded, not `$VARIABLE`.

    Args:
      path: the path as written by the user.
      option: the name of the option or setting, for the message.
    Raises:
      UsageError: the path is empty, an address such as gs://bucket, or names an unknown user.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UsageError(f"{option}={text!r} is not a path: give the path of a file or a folder")
    if _ADDRESS.match(text):
        address = text if "://" in text else text.replace(":/", "://", 1)
        raise UsageError(
            f"{option}={address} is an address, but only local files and folders are supported: "
            "mount or copy it, and give its local path"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(
            f"{option}={text}: the home folder of {text.partition('/')[0]} is unknown; give the "
            f"full path, or ./{text} for a name that starts with ~"
        )
    return Path(expanded)


def local_paths(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function so that `local_path` is applied to all arguments of type `Path`."""
    signature = inspect.signature(function)
    names = {
        name
        for name, parameter in signature.parameters.items()
        if Path in (parameter.annotation, *get_args(parameter.annotation))
    }

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name in names & given.arguments.keys():
            if given.arguments[name] is not None:
                given.arguments[name] = local_path(given.arguments[name], name)
        return function(*given.args, **given.kwargs)

    return wrapped
