"""Reads pickles of lists, numbers, text and NumPy arrays, and runs nothing that they hold.

Data sets come with lists in this form, such as the ground truth of Revisited Oxford and Paris.
Pickles of any protocol are accepted. The machine of `pickles` runs them with the short table of
calls below.
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
      UsageError: there is no such file; it is damaged, too long or no pickle; or it asks for
        anything beyond plain data.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_PICKLE_BYTES:
        raise UsageError(
            f"{path} has {len(content)} bytes, more than the {MAX_PICKLE_BYTES} that a list of "
            "images needs; check what it is"
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
            f"{path} is no pickle of plain data, or it is damaged; fetch the file again"
        ) from error


def _blank_array(subtype: Global, shape: tuple[int, ...], code: bytes | str) -> np.ndarray:
    """An array whose shape, dtype and content follow as its state."""
    if subtype != Global("numpy.ndarray"):
        raise TypeError("an array of another class")
    return np.empty(0, np.uint8)


def _array_of_bytes(content: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    array = np.empty(0, np.uint8)
    _fill(array, (1, shape, dtype, order == "F", content))
    return array


def _fill(array: np.ndarray, state: tuple) -> None:
    """Gives an array its state (version, shape, dtype, whether Fortran's order, bytes)."""
    _, shape, dtype, is_fortran, content = of_type(tuple, state)
    if isinstance(content, str):  # as Python 2 wrote bytes
        content = content.encode("latin1")
    if not isinstance(dtype, np.dtype) or not all(
        type(side) is int and side >= 0 for side in of_type(tuple, shape)
    ):
        raise TypeError("an array without dtype or shape")
    # NumPy takes impossible shapes for memory that runs out, also where a side is 0.
    if len(shape) > MAX_DIMS or math.prod(side or 1 for side in shape) > 2**40:
        raise ValueError("an array of an impossible shape")
    if math.prod(shape) * dtype.itemsize != len(of_type(bytes, content)):
        raise ValueError("an array with more or fewer bytes than its shape has")
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
    """Every protocol's opcodes for plain data, named and read as `pickletools` does."""

    calls = _CALLS

    def __init__(self) -> None:
        super().__init__(make_tensor=None)  # no call here describes one

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
            case "PUT" | "GET":  # protocol 0: the place as text
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
                raise ValueError("a reference to something outside")
            case _:
                super().run(name, argument)

    def _find(self, name: str) -> Global:
        if name in self.calls or name == "numpy.ndarray":
            return Global(name)
        raise TorchFileError(
            f"asks for {name[:200]!r}, which is more than lists, numbers and text: it was refused "
            "and nothing of it ran. Fetch the file again from where the data set comes from"
        )

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, np.ndarray):
            self._count_copies(*of_type(tuple, state))
            _fill(target, state)
        else:
            super()._build(target, state)
