"""Reads config files and overrides their keys from the command line."""

import ast
import difflib
import importlib.util
import pkgutil
import traceback
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

import dino_jax.configs
from dino_jax.config.build import flatten
from dino_jax.errors import UsageError


def list_configs() -> dict[str, str]:
    """The package's configs: {name: first line of its docstring}."""
    summaries = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(dino_jax.configs.__path__)):
        docstring = ast.get_docstring(ast.parse(_path_of(name).read_text())) or ""
        summaries[name] = docstring.partition("\n")[0]
    return summaries


def _path_of(name: str) -> Path:
    return Path(dino_jax.configs.__path__[0]) / f"{name}.py"


def read_config(config: str) -> ConfigDict:
    """Calls the `get_config` function of a config file.

    Args:
      config: the path of a Python file, or the name of one of the package's configs. Text after a
        colon is passed to `get_config`.
    Raises:
      UsageError: the config does not exist or cannot be run.
    """
    file, colon, argument = config.partition(":")
    path = Path(file).expanduser()
    if not path.is_file() and file.isidentifier():
        path = _path_of(file)
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(
            f"config={file} is neither a Python file nor one of the package's configs: choose one "
            f"of {', '.join(list_configs())}, or give the path of your own file"
        )
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_config(*[argument] if colon else [])
    except UsageError:
        raise
    except Exception as error:  # user code can raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(
            f"config={file}{where} raises {type(error).__name__}: {error}; fix the file"
        ) from error
    if not isinstance(found, ConfigDict):
        raise UsageError(f"config={file}: get_config returns {found!r}, not a ConfigDict; fix it")
    return found


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Sets keys of a config from the command line.

    Args:
      config: the config, changed in place.
      arguments: for example `--config.optim.lr=0.001`, or `--config.optim.lr 0.001` as two words.
    Raises:
      UsageError: an argument that is not a setting, an unknown key, or a value of the wrong type.
    """
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--config."):
            raise UsageError(f"unknown argument {word!r}: settings are --config.SECTION.KEY=VALUE")
        if not equals and (text := next(words, None)) is None:
            raise UsageError(f"{word} has no value: write {word}=VALUE")
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
        raise UsageError(f"{key}={text} must be {kind}, such as {known[key]}") from error


def _suggestion(key: str, known: list[str]) -> str:
    section, _, name = key.rpartition(".")
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"it is a section; its keys are {', '.join(inside)}"
    alike = [k for k in known if k.rpartition(".")[2] == name]
    if close := difflib.get_close_matches(key, alike or known, n=3, cutoff=0.75) or alike:
        return f"did you mean {' or '.join(close)}?"
    if beside := [k for k in known if k.startswith(f"{section}.")]:
        return f"the keys of this section are {', '.join(beside)}"
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
    str: ("text", str),
    tuple: ("numbers separated by commas", _numbers),
}
