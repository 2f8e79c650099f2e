"""Reads the pickles inside `.pth` files as plain data.

Python's own unpickler calls whatever a file tells it to call. Here `pickletools` only splits the
pickle into opcodes, and the machine below runs those of protocol 2 that `torch.save` writes: it
pushes inert values and looks up every call in the allow-list of `allowed`. Memory and time are
bounded by the length of the pickle.
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.allowed import (
    CALLS,
    DTYPES,
    STORAGE_DTYPES,
    Global,
    TensorSpec,
    dict_key,
    refusal,
    storage_of,
)

MAX_PICKLE_BYTES = 4 * 2**20  # ten times the largest network's full checkpoint
MAX_DEPTH = 100  # containers within containers
MAX_VALUES = 10**6  # in the result; a shared value counts each time it occurs

# What reading a damaged pickle raises. The warning is pickletools' on invalid escape sequences,
# which becomes an exception where the user turns warnings into errors.
DAMAGE = (IndexError, KeyError, TypeError, ValueError, struct.error, DeprecationWarning)

_PLAIN = (str, int, float, bool, type(None), bytes, np.ndarray)


def read_pickle(data: bytes, make_tensor: Callable[[TensorSpec], np.ndarray]) -> tuple[Any, int]:
    """Reads the pickle at the start of `data`.

    Args:
      data: the pickle, possibly followed by other bytes.
      make_tensor: makes the array for a tensor that the pickle describes.
    Returns: (plain data, the length of the pickle in bytes).
    Raises:
      TorchFileError: the pickle is damaged, asks for anything beyond the allow-list, or its result
        is not plain data of a reasonable depth and size.
    """
    at = 0
    try:
        machine = Machine(make_tensor)
        for opcode, argument, at in pickletools.genops(data):
            if at:
                machine.run(opcode.name, argument)
            elif (opcode.name, argument) != ("PROTO", 2):
                raise TorchFileError(
                    "its pickle does not have protocol 2, the default of torch.save; save the "
                    "file again with the default"
                )
        return machine.result(), at + 1  # STOP is one byte
    except TorchFileError:
        raise
    except DAMAGE as error:
        raise TorchFileError(
            f"its pickle is damaged or incomplete near byte {at}; download or save the file again"
        ) from error


class Machine:
    """Runs opcodes, by their names in `pickletools`, on a stack and a memo.

    Attributes:
      calls: the functions that may be called, by their names in a pickle.
    """

    calls = CALLS

    def __init__(self, make_tensor: Callable[[TensorSpec], np.ndarray]) -> None:
        self._make_tensor = make_tensor
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack under each open MARK
        self._memo: dict[int, Any] = {}
        self._namespaces: dict[int, dict] = {}  # by id
        self._copied = 0  # items

    def run(self, name: str, argument: Any) -> None:
        """Runs one opcode."""
        stack = self._stack
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "NONE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BINUNICODE":
                argument.encode()  # raises on lone surrogates, which nobody could print
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING":  # text of Python 2
                stack.append(argument.encode("latin1").decode())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(name[-1])
                if len(stack) < length:
                    raise IndexError("too few items for a tuple")
                stack[-length:] = [tuple(stack[-length:])]
            case "TUPLE":
                items = self._pop_mark()
                self._stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                of_type(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._pop_mark()
                of_type(list, self._stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                of_type(dict, stack[-1])[dict_key(key)] = value
            case "SETITEMS":
                items = self._pop_mark()
                target = of_type(dict, self._stack[-1])
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[dict_key(key)] = value
            case "GLOBAL":
                stack.append(self._find(argument.replace(" ", ".", 1)))
            case "BINPERSID":
                stack.append(storage_of(of_type(tuple, stack.pop())))
            case "REDUCE" | "NEWOBJ":
                arguments = of_type(tuple, stack.pop())
                stack.append(self._call(of_type(Global, stack.pop()), arguments))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case "STOP":
                pass
            case _:
                raise TorchFileError(
                    f"its pickle has the opcode {name}, which plain data and tensors do not need; "
                    "download or save the file again"
                )

    def result(self) -> Any:
        """The value that is left at the end, checked to be plain data."""
        (value,) = self._stack
        if self._below:
            raise ValueError("a MARK is left on the stack")
        _check_plain(value)
        return value

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _find(self, name: str) -> Global | str:
        if name in DTYPES:
            return name
        if name in self.calls or name in STORAGE_DTYPES:
            return Global(name)
        raise refusal(name)

    def _call(self, function: Global, arguments: tuple) -> Any:
        self._count_copies(*arguments)
        result = self.calls[function.name](*arguments)
        if isinstance(result, TensorSpec):
            return self._make_tensor(result)
        if function.name == "argparse.Namespace":
            self._namespaces[id(result)] = result  # keeps it alive, so the id stays unique
        return result

    def _build(self, target: Any, state: Any) -> None:
        """Sets the state of an object; only the attributes of a namespace are kept."""
        if id(target) in self._namespaces:
            self._count_copies(of_type(dict, state))
            target.update(state)
        elif isinstance(target, np.dtype):
            if of_type(str, state[1]) not in ("<", "|"):
                raise TorchFileError("it has a big-endian NumPy number; save it as plain Python")
        elif type(target) is not dict and not isinstance(target, np.ndarray):
            raise TypeError("state for an object that has none")
        # Otherwise: attributes of an OrderedDict (a state dict's `_metadata`) or of a parameter.

    def _count_copies(self, *values: Any) -> None:
        """Bounds the data that calls copy: one long argument can be passed to many calls."""
        self._copied += sum(
            len(v) for v in values if isinstance(v, (str, bytes, list, tuple, dict))
        )
        if self._copied > MAX_PICKLE_BYTES:
            raise TorchFileError("its pickle expands to far more data than its size; rejected")


def of_type(expected: type, value: Any) -> Any:
    if type(value) is not expected:
        raise TypeError(f"{type(value).__name__} instead of {expected.__name__}")
    return value


def _check_plain(value: Any) -> None:
    """Checks that a value is plain data, and small and shallow enough to be traversed."""
    number, stack = 1, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if type(item) in (dict, list, tuple):
            number += len(item)
            if depth == MAX_DEPTH or number > MAX_VALUES:  # also if a list contains itself
                raise TorchFileError(
                    f"its data is nested deeper than {MAX_DEPTH} levels or has more than "
                    f"{MAX_VALUES} values; save less data in it"
                )
            items = item.values() if type(item) is dict else item
            stack.extend((child, depth + 1) for child in items)
        elif type(item) not in _PLAIN:
            raise TorchFileError(
                f"it has a bare {type(item).__name__.lower()}; save only tensors and plain data"
            )
