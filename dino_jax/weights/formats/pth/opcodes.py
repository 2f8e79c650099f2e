"""The opcodes of Python's pickle that `torch.save` writes, and their arguments.

Format: `pickletools` in Python's standard library; these are the opcodes of protocol 2 for data.
"""

import struct
from collections.abc import Iterator
from typing import Any

from dino_jax.errors import TorchFileError

MAX_PICKLE_BYTES = 4 * 2**20  # a full checkpoint of the largest network has a tenth of it

_LONGEST_NAME = 1000  # bytes of a global's module or name
_BARE = {
    b"(": "MARK",
    b".": "STOP",
    b"N": "NONE",
    b"\x88": "NEWTRUE",
    b"\x89": "NEWFALSE",
    b")": "EMPTY_TUPLE",
    b"\x85": "TUPLE1",
    b"\x86": "TUPLE2",
    b"\x87": "TUPLE3",
    b"t": "TUPLE",
    b"]": "EMPTY_LIST",
    b"a": "APPEND",
    b"e": "APPENDS",
    b"}": "EMPTY_DICT",
    b"s": "SETITEM",
    b"u": "SETITEMS",
    b"R": "REDUCE",
    b"\x81": "NEWOBJ",
    b"b": "BUILD",
    b"Q": "BINPERSID",
}
_FIXED = {  # opcodes with an argument of fixed size, and its layout
    b"\x80": ("PROTO", struct.Struct("<B")),
    b"K": ("BININT1", struct.Struct("<B")),
    b"M": ("BININT2", struct.Struct("<H")),
    b"J": ("BININT", struct.Struct("<i")),
    b"G": ("BINFLOAT", struct.Struct(">d")),
    b"q": ("BINPUT", struct.Struct("<B")),
    b"r": ("LONG_BINPUT", struct.Struct("<I")),
    b"h": ("BINGET", struct.Struct("<B")),
    b"j": ("LONG_BINGET", struct.Struct("<I")),
}
_COUNTED = {  # opcodes with a length, its layout, and that many bytes
    b"\x8a": ("LONG1", struct.Struct("<B")),
    b"X": ("BINUNICODE", struct.Struct("<I")),
    b"U": ("SHORT_BINSTRING", struct.Struct("<B")),  # text of Python 2, as is BINSTRING
    b"T": ("BINSTRING", struct.Struct("<I")),
}


def opcodes(data: bytes) -> Iterator[tuple[str, Any, int]]:
    """Yields (name, argument, position behind both) up to STOP, and runs nothing.

    Raises:
      TorchFileError: an opcode that is not in the tables, or no STOP.
      IndexError, ValueError, struct.error: an argument is damaged.
    """
    at = 0
    while True:
        code = data[at : at + 1]
        at += 1
        argument = None
        if code in _BARE:
            name = _BARE[code]
        elif code in _FIXED:
            name, layout = _FIXED[code]
            (argument,) = layout.unpack_from(data, at)
            at += layout.size
        elif code in _COUNTED:
            name, layout = _COUNTED[code]
            (length,) = layout.unpack_from(data, at)
            at += layout.size
            argument = data[at : at + length]
            if len(argument) != length:
                raise IndexError("an argument that reaches beyond the pickle")
            at += length
        elif code == b"c":
            name = "GLOBAL"
            module, at = _line(data, at)
            attribute, at = _line(data, at)
            argument = f"{module}.{attribute}"
        elif code:
            raise TorchFileError(
                f"its pickle has opcode {code!r}, which torch.save does not write; fetch the file "
                "again, or save it with torch's default pickle_protocol"
            )
        else:
            raise TorchFileError(
                f"its pickle ends early, or is longer than {MAX_PICKLE_BYTES} bytes; fetch the "
                "file again"
            )
        yield name, argument, at
        if name == "STOP":
            return


def _line(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\n", at, at + _LONGEST_NAME)
    return data[at:end].decode(), end + 1
