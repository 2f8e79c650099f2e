"""Reads `.pth` files in the format of `torch.save` before the zip format (torch 0.2 to 1.5).

Five pickles (a magic number, a version, facts of the machine, the object, the storages' keys), then
for each key a 64-bit count of elements and the elements. There are no checksums.
"""

import struct
from typing import Any

import numpy as np

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.allowed import Storage, TensorSpec, storage_bytes, tensor_view
from dino_jax.weights.formats.pth.pickles import MAX_PICKLE_BYTES, read_pickle

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickled number

_VERSION = 1001
_COUNT = struct.Struct("<q")


def read_legacy(file: memoryview) -> Any:
    """Reads a whole file; see `read_torch_file`.

    Args:
      file: [n] uint8, the file. Tensors are views of it.
    Returns: plain data.
    Raises:
      TorchFileError: the file is damaged or unsafe.
    """
    version, at = _read_plain(file, len(LEGACY_MAGIC))
    machine, at = _read_plain(file, at)
    if version != _VERSION or not isinstance(machine, dict):
        raise TorchFileError(f"not version {_VERSION} of torch's old format; save it again")
    if machine.get("little_endian") is not True:
        raise TorchFileError("tensors in big-endian order; save it on a little-endian machine")
    pickle = bytes(file[at : at + MAX_PICKLE_BYTES])

    # Where a storage lies depends on the types of those before it, which only the object's pickle
    # tells, which comes first: so it is read once for the storages and once for the tensors.
    declared: dict[str, Storage] = {}

    def note_storage(spec: TensorSpec) -> np.ndarray:
        of = spec.storage
        known = declared.setdefault(of.key, of)
        if (known.dtype, known.numel) != (of.dtype, of.numel):
            raise TorchFileError(f"two accounts of storage {of.key[:40]!r}; fetch the file again")
        return np.empty(0, spec.dtype)

    _, length = read_pickle(pickle, note_storage)
    keys, at = _read_plain(file, at + length)
    storages = _read_storages(file, at, keys, declared)

    def make_tensor(spec: TensorSpec) -> np.ndarray:
        return tensor_view(spec, storages[spec.storage.key])

    value, _ = read_pickle(pickle, make_tensor)
    return value


def _read_plain(file: memoryview, at: int) -> tuple[Any, int]:
    """The pickle at `at`, which has no tensors, and where it ends."""

    def refuse(spec: TensorSpec) -> np.ndarray:
        raise TorchFileError("a tensor in its header; fetch the file again")

    value, length = read_pickle(bytes(file[at : at + MAX_PICKLE_BYTES]), refuse)
    return value, at + length


def _read_storages(
    file: memoryview, at: int, keys: Any, declared: dict[str, Storage]
) -> dict[str, np.ndarray]:
    """The bytes of each storage, [n] uint8, from `at` to the end of the file."""
    if not (type(keys) is list and all(type(key) is str for key in keys)) or (
        sorted(keys) != sorted(declared)
    ):
        raise TorchFileError("its storages are not those of its tensors; fetch the file again")
    storages = {}
    for key in keys:
        of = declared[key]
        first, last = at + _COUNT.size, at + _COUNT.size + of.numel * of.dtype.itemsize
        if last > len(file):
            raise TorchFileError(
                f"cut short: {last} bytes are promised but it has {len(file)}; fetch it again"
            )
        if _COUNT.unpack_from(file, at)[0] != of.numel:
            raise TorchFileError(f"storage {key[:40]!r} has another length than its tensors say")
        storages[key] = storage_bytes(file[first:last], of.dtype)
        at = last
    if at != len(file):
        raise TorchFileError(f"{len(file) - at} bytes follow its last tensor; fetch it again")
    return storages
