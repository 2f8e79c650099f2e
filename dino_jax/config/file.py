"""Reads a config file, and sets its keys from the command line."""

import ast
import difflib
import importlib.util
import traceback
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from dino_jax.config.build import flatten
from dino_jax.errors import UsageError


def read_config(path: str) -> ConfigDict:
    """What `get_config` of a config file returns.

    Args:
      path: of the Python file; what stands behind a colon is the argument of `get_config`.
    Raises:
      UsageError: there is no such file, or it cannot be run.
    """
    file, colon, argument = path.partition(":")
    if not Path(file).is_file() or not file.endswith(".py"):
        raise UsageError(f"config={file} is not a Python file: give one of configs/, or your own")
    spec = importlib.util.spec_from_file_location("config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] if colon else [])
    except UsageError:
        raise
    except Exception as error:  # the file is the user's: whatever it raises is to be mended there
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(
            f"config={file}{where} raises {type(error).__name__}: {error}; mend the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config={file}: get_config returns {config!r}, not a ConfigDict; mend it")
    return config


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Sets the keys that a command line names.

    Args:
      config: changed in place.
      arguments: such as `--config.optim.lr=0.001`, or the same in two words.
    Raises:
      UsageError: not such an argument, an unknown key, or a value of another type.
    """
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--config."):
            raise UsageError(f"unknown argument {word!r}: settings are --config.SECTION.KEY=VALUE")
        if not equals and (text := next(words, None)) is None:
            raise UsageError(f"{word} lacks its value: write {word}=VALUE")
        _set(config, name.removeprefix("--config."), text)


def _set(config: ConfigDict, key: str, text: str) -> None:
    known = flatten(config)
    if key not in known:
        raise UsageError(f"unknown setting {key!r}: {_suggestion(key, list(known))}")
    *sections, name = key.split(".")
    section = reduce(getattr, sections, config)
    may_be_unset = isinstance(
        dict(section.items(preserve_field_references=True))[name], FieldReference
    )
    if may_be_unset and text.lower() == "none":
        section[name] = None
        return
    kind, parse = _TYPES[section.get_type(name)]
    try:
        section[name] = parse(text)
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"{key}={text} is not {kind}, such as {known[key]}") from error


def _suggestion(key: str, known: list[str]) -> str:
    section, _, name = key.rpartition(".")
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"it has the keys {', '.join(inside)}"
    alike = [k for k in known if k.rpartition(".")[2] == name]
    if close := difflib.get_close_matches(key, alike or known, n=3, cutoff=0.75) or alike:
        return f"did you mean {' or '.join(close)}?"
    if beside := [k for k in known if k.startswith(f"{section}.")]:
        return f"there are {', '.join(beside)}"
    return "configs/default.py describes every key"


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _numbers(text: str) -> tuple[float, ...]:
    value = ast.literal_eval(text)
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError(text)
    return numbers


_TYPES: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _boolean),
    float: ("a number", float),
    int: ("a whole number", int),
    str: ("a text", str),
    tuple: ("numbers with commas between them", _numbers),
}
