"""Reads config files and overrides their keys from the command line."""

import ast
import difflib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

import dino_jax.configs
from dino_jax.config.build import flatten
from dino_jax.errors import UsageError, about, listed
from dino_jax.paths import local_path


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
    """Calls the `get_config` function of a config file, and checks what it returns.

    Args:
      config: the path of a Python file, or the name of one of the package's configs. Text after a
        colon is passed to `get_config`.
    Raises:
      UsageError: the config does not exist, cannot be run, or does not have the keys and types of
        `configs/default.py`.
    """
    if "://" in config:
        local_path(config, "config")  # raises, as it is an address
    file, argument = re.fullmatch(r"(.+?\.py|[^:]*)(?::(.*))?", config, re.DOTALL).groups()
    path = local_path(file, "config")
    if not path.is_file() and file.isidentifier():
        path = _path_of(file)
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(
            f"config={file} is neither a Python file nor one of the package's configs: choose one "
            f"of {', '.join(list_configs())}, or give the path of your own file"
        )
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    with about(f"config={file}"):
        try:
            with _own_configs():
                spec.loader.exec_module(module)
                found = _call(module, argument)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # user code can raise anything
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
            where = f"line {lines[-1]} " if lines else "it "
            raise UsageError(
                f"{where}raises {type(error).__name__}: {error}; fix the file"
            ) from error
        return checked_config(found)


@contextmanager
def _own_configs() -> Iterator[None]:
    """A context in which `configs` is this package's, whatever else is installed by that name."""

    def others() -> dict[str, ModuleType]:
        return {name: x for name, x in sys.modules.items() if name.partition(".")[0] == "configs"}

    before = others()
    for name in before:
        del sys.modules[name]
    sys.modules["configs"] = dino_jax.configs
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "configs" or error.name == "dino_jax.configs":
            raise UsageError(
                f"{error}: in a config file, `configs` is the package of dino_jax, which contains "
                f"{', '.join(list_configs())}; rename your own package"
            ) from error
        raise
    finally:
        for name in others():
            del sys.modules[name]
        sys.modules.update(before)


def _call(module: ModuleType, argument: str | None) -> Any:
    """Calls `get_config`, whose parameter may be missing if no argument is given."""
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UsageError("it does not define a function get_config(arg): add one")
    takes = inspect.signature(get_config).bind
    for arguments in ([argument],) if argument is not None else ([], [""]):
        try:
            takes(*arguments)
        except TypeError:
            continue
        return get_config(*arguments)
    if argument is None:
        raise UsageError('get_config needs more than one argument: define get_config(arg="")')
    raise UsageError(
        f"get_config takes no argument, but :{argument} was given: remove it, or define "
        'get_config(arg="")'
    )


def default_config() -> ConfigDict:
    """The config that defines every key and its type."""
    from dino_jax.configs import default

    return default.get_config()


def checked_config(found: Any) -> ConfigDict:
    """A config with values of the right types, such as tuples for lists.

    Args:
      found: a ConfigDict, which is changed in place, or another mapping, which is copied.
    Raises:
      UsageError: keys are unknown or missing, or values have the wrong type.
    """
    if not isinstance(found, Mapping | ConfigDict):
        raise UsageError(f"the config is {found!r}, not a ConfigDict: fix it")
    try:
        config = found if type(found) is ConfigDict else ConfigDict(dict(found))
        problems = list(_problems(config, default_config(), ""))
    except (TypeError, ValueError, RequiredValueError) as error:  # such as a number as a name
        raise UsageError(f"the config is not a valid ConfigDict ({error}): fix it") from error
    if problems:
        raise UsageError(listed(problems, limit=3, separator="; "))
    return config


def _problems(section: ConfigDict, template: ConfigDict, prefix: str) -> Iterator[str]:
    """Finds wrong keys and values, and converts values to the template's types."""
    known = list(flatten(default_config()))
    for name, value in section.items():
        key = f"{prefix}{name}"
        if name not in template:
            yield f"unknown setting {key!r}: {_suggestion(key, known)}"
        elif isinstance(template[name], ConfigDict):
            if isinstance(value, ConfigDict):
                yield from _problems(value, template[name], f"{key}.")
            else:
                inside = ", ".join(k for k in known if k.startswith(f"{key}."))
                yield f"{key}={value!r} must be a section; its keys are {inside}"
        else:
            try:
                converted = _converted(template, name, value)
            except ValueError:
                kind, _ = _TYPES[template.get_type(name)]
                shown = "a section" if isinstance(value, ConfigDict) else repr(value)
                yield f"{key} is {shown}, but must be {kind}, such as {template[name]}"
            else:
                if repr(converted) != repr(value):  # another type, also of an element
                    with section.unlocked(), section.ignore_type():
                        section[name] = converted
    if missing := [f"{prefix}{name}" for name in template if name not in section]:
        yield (
            f"missing settings {listed(missing)}: start from default.get_config() of "
            "dino_jax.configs, and change only what differs"
        )


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
    section, template = (reduce(getattr, sections, x) for x in (config, default_config()))
    kind, parse = _TYPES[template.get_type(name)]
    try:
        value = None if _optional(template, name) and text.lower() == "none" else parse(text)
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"{key}={text} must be {kind}, such as {known[key]}") from error
    with section.unlocked(), section.ignore_type():
        section[name] = value


def _optional(template: ConfigDict, name: str) -> bool:
    """Whether a key of the default config may be None."""
    fields = dict(template.items(preserve_field_references=True))
    return isinstance(fields[name], FieldReference)


def _converted(template: ConfigDict, name: str, value: Any) -> Any:
    """A value with the type of the template's key, without changing what it means.

    Raises:
      ValueError: it has another type.
    """
    kind = template.get_type(name)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None and _optional(template, name):
        return None
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, tuple | list):
        return _numbers(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


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


def _numbers(value: Any) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    numbers = tuple(x.item() if isinstance(x, np.generic) else x for x in numbers)
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError(value)
    return numbers


_TYPES: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _boolean),
    float: ("a number", float),
    int: ("a whole number", int),
    str: ("text", str),
    tuple: ("numbers separated by commas", lambda text: _numbers(ast.literal_eval(text))),
}
