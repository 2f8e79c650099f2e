"""Reads pickles of lists, numbers, text and NumPy arrays, without running any code from them.

Some data sets use such files, for example the ground truth of Revisited Oxford and Paris. Pickles
of every protocol are accepted. The machine of `pickles` runs them with the short table of calls
below.
"""

import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax.errors import TorchFileError, UsageError
from dino_jax.weights.formats.pth.allowed import CALLS, MAX_DIMS, Global, dict_key
from dino_jax.weights.formats.pth.pickles import DAMAGE, MAX_PICKLE_BYTES, Machine, of_type


def read_plain_pickle(path: str | Path) -> Any:
    """Reads a pickle file as plain data.

    Args:
      path: the file.
    Returns: dict, list, tuple, str, bytes, numbers, None, and NumPy arrays of numbers.
    Raises:
      UsageError: the file is missing, damaged, too long or not a pickle, or contains more than
        plain data.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_PICKLE_BYTES:
        raise UsageError(
            f"{path} has {len(content)} bytes, but at most {MAX_PICKLE_BYTES} are allowed; check "
            "the path"
        )
    machine = _PlainMachine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.run(opcode.name, argument)
        return machine.result()
    except TorchFileError as error:
        raise UsageError(f"{path}: {error}") from error
    except DAMAGE as error:
        raise UsageError(
            f"{path} is damaged or not a pickle of plain data; download the file again"
        ) from error


def _blank_array(subtype: Global, shape: tuple[int, ...], code: bytes | str) -> np.ndarray:
    """An empty array whose shape, dtype and contents follow as its state."""
    if subtype != Global("numpy.ndarray"):
        raise TypeError("an array of another class")
    return np.empty(0, np.uint8)


def _array_of_bytes(content: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    array = np.empty(0, np.uint8)
    _fill(array, (1, shape, dtype, order == "F", content))
    return array


def _fill(array: np.ndarray, state: tuple) -> None:
    """Sets the state of an array: (version, shape, dtype, whether Fortran order, bytes)."""
    _, shape, dtype, is_fortran, content = of_type(tuple, state)
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin1")
    if not isinstance(dtype, np.dtype) or not all(
        type(side) is int and side >= 0 for side in of_type(tuple, shape)
    ):
        raise TypeError("an array without a dtype or shape")
    # For invalid shapes NumPy raises MemoryError, even if a side is 0.
    if len(shape) > MAX_DIMS or math.prod(side or 1 for side in shape) > 2**40:
        raise ValueError("an array of an invalid shape")
    if math.prod(shape) * dtype.itemsize != len(of_type(bytes, content)):
        raise ValueError("an array whose number of bytes does not match its shape")
    array.__setstate__((1, shape, dtype, bool(is_fortran), content))


_CALLS: dict[str, Callable[..., Any]] = {
    name: CALLS[name]
    for name in ("collections.OrderedDict", "_codecs.encode", "__builtin__.bytes", "numpy.dtype")
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _CALLS |= {
        f"{_core}.multiarray.scalar": CALLS[f"{_core}.multiarray.scalar"],
        f"{_core}.multiarray._reconstruct": _blank_array,
        f"{_core}.numeric._frombuffer": _array_of_bytes,
    }


class _PlainMachine(Machine):
    """Runs the opcodes for plain data of every protocol."""

    calls = _CALLS

    def __init__(self) -> None:
        super().__init__(make_tensor=None)  # no call in the table makes a tensor

    def run(self, name: str, argument: Any) -> None:
        """Runs one opcode."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "INT" | "LONG" | "LONG1" | "LONG4" | "FLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(bytes(argument))
            case "PUT" | "GET":  # of protocol 0
                super().run(f"BIN{name}", argument)
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "LIST":
                items = self._pop_mark()
                self._stack.append(items)
            case "DICT":
                items = self._pop_mark()
                pairs = zip(items[::2], items[1::2], strict=True)
                self._stack.append({dict_key(key): value for key, value in pairs})
            case "STACK_GLOBAL":
                attribute, module = of_type(str, stack.pop()), of_type(str, stack.pop())
                stack.append(self._find(f"{module}.{attribute}"))
            case "BINPERSID":
                raise ValueError("a reference to an external object")
            case _:
                super().run(name, argument)

    def _find(self, name: str) -> Global:
        if name in self.calls or name == "numpy.ndarray":
            return Global(name)
        raise TorchFileError(
            f"it asks for {name[:200]!r}, but only lists, numbers and text are allowed; nothing "
            "in it was run. Download the file again from the source of the data set"
        )

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, np.ndarray):
            self._count_copies(*of_type(tuple, state))
            _fill(target, state)
        else:
            super()._build(target, state)
