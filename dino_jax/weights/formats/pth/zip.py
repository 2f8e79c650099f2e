"""Reads `.pth` files in the zip format of `torch.save` (torch 1.6 and later).

The archive is parsed here instead of by `zipfile`, because tensors are views of the mapped file:
members must be uncompressed, and everything is checked before anything is allocated.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7 to 4.3.16 and 4.5.3.
"""

import functools
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.allowed import TensorSpec, storage_bytes, tensor_view
from dino_jax.weights.formats.pth.pickles import MAX_PICKLE_BYTES, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
MAX_MEMBERS = 2**16

_END = struct.Struct("<4s4H2IH")  # end of central directory
_LOCATOR = struct.Struct("<4sIQI")  # of the zip64 end record
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")  # of the central directory
_LOCAL = struct.Struct("<4s5H3I2H")  # before a member's bytes
_UNKNOWN = 0xFFFFFFFF  # the number is in the zip64 field instead
_ENCRYPTED = 0x1
_TORCHSCRIPT = (
    "a TorchScript archive, which contains a program; load it with torch.jit.load and save its "
    "state_dict() with torch.save"
)
_NUMPY = "a NumPy .npz file; give the .pth file, or save its arrays as tensors with torch.save"


class Member(NamedTuple):
    """A file in the archive, as described by the central directory."""

    name: bytes
    size: int
    crc: int
    header: int  # the position of its local header
    end: int  # the position of the central directory, before which the member must end


def read_zip(file: memoryview) -> Any:
    """Reads a whole archive; see `read_torch_file`.

    Args:
      file: [n] uint8, the file. Tensors are views of it.
    Returns: plain data.
    Raises:
      TorchFileError: the archive is damaged, unsafe, or not written by `torch.save`.
    """
    members = read_directory(file)
    roots = [name[: -len("/data.pkl")] for name in members if name.endswith("/data.pkl")]
    if members and all(name.endswith(".npy") for name in members):
        raise TorchFileError(_NUMPY)
    if len(roots) != 1 or "/" in roots[0]:
        raise TorchFileError(
            "a zip archive that torch.save did not write, because it does not have exactly one "
            "FOLDER/data.pkl; unpack it if it contains the .pth file"
        )
    root = roots[0]
    if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in members):
        raise TorchFileError(_TORCHSCRIPT)
    byteorder = members.get(f"{root}/byteorder")  # absent before torch 2.1
    if byteorder and bytes(member_bytes(file, byteorder)) != b"little":
        raise TorchFileError("its tensors are big-endian; save it on a little-endian machine")

    @functools.cache
    def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        member = members.get(f"{root}/data/{key}")
        if member is None or member.size != numel * dtype.itemsize:
            raise TorchFileError(
                f"storage {key[:40]!r} is missing from the archive or has another size; download "
                "the file again"
            )
        return storage_bytes(member_bytes(file, member), dtype)

    def make_tensor(spec: TensorSpec) -> np.ndarray:
        of = spec.storage
        return tensor_view(spec, storage(of.key, of.dtype, of.numel))

    pickle = members[f"{root}/data.pkl"]
    if pickle.size > MAX_PICKLE_BYTES:
        raise TorchFileError(
            f"it has {pickle.size} bytes besides its tensors, but at most {MAX_PICKLE_BYTES} are "
            "allowed; save less data in it"
        )
    value, length = read_pickle(bytes(member_bytes(file, pickle)), make_tensor)
    if length != pickle.size:
        raise TorchFileError("it has bytes after its pickle; download or save the file again")
    return value


def read_directory(file: memoryview) -> dict[str, Member]:
    """The members of an archive by name, with checked names, sizes and number."""
    end = len(file) - _END.size
    if end < 0 or file[end : end + 4] != b"PK\x05\x06":
        raise TorchFileError(
            "it starts like a file of torch.save but does not end like one, so bytes are missing "
            "or were appended; download it again"
        )
    *_, number, length, start, _ = _END.unpack_from(file, end)
    locator = end - _LOCATOR.size
    if locator >= 0 and file[locator : locator + 4] == b"PK\x06\x07":
        _, _, end, _ = _LOCATOR.unpack_from(file, locator)
        signature, *_, number, length, start = _unpack(_END64, file, end)
        _expect(signature == b"PK\x06\x06")
    _expect(start + length <= end)
    if number > MAX_MEMBERS:
        raise TorchFileError(f"it has {number} members, but at most {MAX_MEMBERS} are allowed")
    members: dict[str, Member] = {}
    at = start
    for _ in range(number):
        member, at = _read_entry(file, at, start)
        name = _checked_name(member.name)
        _expect(name not in members)
        members[name] = member
    _expect(at == start + length)
    _expect(sum(member.size for member in members.values()) <= len(file))  # no shared bytes
    return members


def member_bytes(file: memoryview, member: Member) -> memoryview:
    """The bytes of a member as a view of the file, after verifying its checksum."""
    signature, *_, name_length, extra_length = _unpack(_LOCAL, file, member.header)
    name = member.header + _LOCAL.size
    first = name + name_length + extra_length
    _expect(signature == ZIP_MAGIC and file[name : name + name_length] == member.name)
    _expect(first + member.size <= member.end)
    content = file[first : first + member.size]
    if zlib.crc32(content) != member.crc:
        raise TorchFileError(
            f"damaged: the checksum of {member.name.decode()!r} differs; download it again"
        )
    return content


def _read_entry(file: memoryview, at: int, start: int) -> tuple[Member, int]:
    """Reads the directory entry at `at`; returns it and the position of the next one."""
    signature, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, header = _unpack(
        _ENTRY, file, at
    )
    name_length, extra_length, comment_length = lengths
    _expect(signature == b"PK\x01\x02")
    at += _ENTRY.size
    name = bytes(file[at : at + name_length])
    at += name_length
    wide = _zip64_numbers(file[at : at + extra_length])
    size, packed, header = (
        next(wide, _UNKNOWN) if n == _UNKNOWN else n for n in (size, packed, header)
    )
    if method != 0 and name.endswith(b".npy"):
        raise TorchFileError(_NUMPY)
    if method != 0 and b"/code/" in name:
        raise TorchFileError(_TORCHSCRIPT)
    if method != 0 or packed != size or flags & _ENCRYPTED:
        raise TorchFileError(
            "a compressed or encrypted zip archive, which torch.save does not write; unpack it if "
            "it contains the .pth file, or save it again with torch"
        )
    return Member(name, size, crc, header, start), at + extra_length + comment_length


def _zip64_numbers(extra: memoryview) -> Iterator[int]:
    """The 64-bit numbers in the zip64 field, in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1 and at + length <= len(extra):
            for number in range(at, at + length - 7, 8):
                yield struct.unpack_from("<Q", extra, number)[0]
        at += length


def _checked_name(name: bytes) -> str:
    """Decodes a member's name, which must be a plain relative path."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    parts = text.split("/")
    if "" in parts or ".." in parts or "." in parts or re.search(r"[\x00-\x1f\\]", text):
        raise TorchFileError(f"it has a member with the unsafe name {name[:80]!r}; rejected")
    return text


def _unpack(layout: struct.Struct, file: memoryview, at: int) -> tuple:
    _expect(at + layout.size <= len(file))
    return layout.unpack_from(file, at)


def _expect(condition: bool) -> None:
    if not condition:
        raise TorchFileError("its zip structure is damaged; download or save the file again")
