"""Builds valid and damaged files in the formats of `torch.save`, byte by byte."""

import dataclasses
import io
import math
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.file import read_torch_file
from dino_jax.weights.formats.pth.legacy import LEGACY_MAGIC

REBUILD = "torch._utils._rebuild_tensor_v2"
KINDS = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a global; `state` is applied to the result unless it is None."""

    name: str
    arguments: tuple = ()
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Type:
    """A global that is not called."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """A persistent id."""

    parts: tuple


@dataclasses.dataclass(frozen=True)
class Opcodes:
    """Raw bytes of a pickle."""

    content: bytes


def opcodes(value: Any) -> bytes:
    """The opcodes of protocol 2 that leave `value` on the stack."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(content)]) + content
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            content = value.encode()
            return b"X" + struct.pack("<I", len(content)) + content
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
        case Type(name):
            module, _, attribute = name.rpartition(".")
            return f"c{module}\n{attribute}\n".encode()
        case Call(name, arguments, state):
            build = b"" if state is None else opcodes(state) + b"b"
            return opcodes(Type(name)) + opcodes(arguments) + b"R" + build
        case Reference(parts):
            return opcodes(parts) + b"Q"
        case Opcodes(content):
            return content
    raise TypeError(f"no opcodes for {value!r}")


def pickle_of(value: Any) -> bytes:
    """A complete pickle."""
    return b"\x80\x02" + opcodes(value) + b"."


def storage(numel: Any, kind: str = "Float", key: Any = "0", *view: Any) -> Reference:
    """A reference to a storage; `view` exists only in the legacy format."""
    return Reference(("storage", Type(f"torch.{kind}Storage"), key, "cpu", numel, *view))


def tensor(of: Any, offset: Any, size: Any, stride: Any) -> Call:
    """A tensor on the storage `of`, as saved by torch."""
    return Call(REBUILD, (of, offset, size, stride, False, Call("collections.OrderedDict")))


def zip_file(
    value: Any, storages: dict[str, bytes] | None = None, more: dict[str, bytes] | None = None
) -> bytes:
    """A file in the zip format.

    Args:
      value: the value of its pickle, or the complete pickle.
      storages: bytes by key.
      more: additional members by name, or other contents for `data.pkl` and `byteorder`.
    """
    members = {
        "archive/data.pkl": value if isinstance(value, bytes) else pickle_of(value),
        "archive/byteorder": b"little",
        **{f"archive/data/{key}": content for key, content in (storages or {}).items()},
        "archive/version": b"3\n",
        **(more or {}),
    }
    return archive(members)


def save(path: Path, value: Any) -> Path:
    """Writes plain data with arrays in the format of `torch.save`, and returns the path."""
    storages: dict[str, bytes] = {}

    def described(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            key = str(len(storages))
            storages[key] = part.tobytes()
            strides = tuple(math.prod(part.shape[i + 1 :]) for i in range(part.ndim))
            return tensor(storage(part.size, KINDS[part.dtype.name], key), 0, part.shape, strides)
        if isinstance(part, dict):
            return {key: described(x) for key, x in part.items()}
        return [described(x) for x in part] if isinstance(part, list) else part

    path.write_bytes(zip_file(described(value), storages))
    return path


def archive(members: dict[str, bytes]) -> bytes:
    """An uncompressed zip archive with these members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


def legacy_file(
    value: Any,
    storages: dict[str, np.ndarray],
    *,
    version: Any = 1001,
    machine: Any = None,
    keys: Any = None,
) -> bytes:
    """A file in the legacy format; `keys` defaults to those of `storages`."""
    machine = {"protocol_version": 1001, "little_endian": True} if machine is None else machine
    keys = list(storages) if keys is None else keys
    pickles = (pickle_of(part) for part in (version, machine, value, keys))
    contents = (struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    return LEGACY_MAGIC + b"".join(pickles) + b"".join(contents)


def with_checksums(file: bytes) -> bytes:
    """The zip archive with every member's checksum updated."""
    content = bytearray(file)
    at = file.find(b"PK\x01\x02")
    while content[at : at + 4] == b"PK\x01\x02":
        (size,) = struct.unpack_from("<I", file, at + 24)
        (header,) = struct.unpack_from("<I", file, at + 42)
        first = header + 30 + sum(struct.unpack_from("<2H", file, header + 26))
        struct.pack_into("<I", content, at + 16, zlib.crc32(content[first : first + size]))
        at += 46 + sum(struct.unpack_from("<3H", file, at + 28))
    return bytes(content)


def read(content: bytes) -> Any:
    """Reads a file of these bytes; the arrays remain valid."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as stream:
        stream.write(content)
        stream.flush()
        return read_torch_file(stream.name)


def expect_error(content: bytes, message: str) -> None:
    """Checks that reading these bytes raises our error with a message that matches."""
    with pytest.raises(TorchFileError, match=message):
        read(content)
