"""Reads `.pth` files in the legacy format of `torch.save` (torch 0.2 to 1.5), before zip files.

Five pickles (a magic number, a version, facts about the machine, the object, the storages' keys),
then for each key a 64-bit number of elements and the elements. There are no checksums.
"""

import struct
from typing import Any

import numpy as np

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.allowed import Storage, TensorSpec, storage_bytes, tensor_view
from dino_jax.weights.formats.pth.pickles import MAX_PICKLE_BYTES, read_pickle

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickled integer

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
        raise TorchFileError(f"not version {_VERSION} of torch's legacy format; save it again")
    if machine.get("little_endian") is not True:
        raise TorchFileError("its tensors are big-endian; save it on a little-endian machine")
    pickle = bytes(file[at : at + MAX_PICKLE_BYTES])

    # The position of a storage depends on the dtypes of the storages before it, which only the
    # object's pickle contains. So the pickle is read twice: for the storages, then for the tensors.
    declared: dict[str, Storage] = {}

    def note_storage(spec: TensorSpec) -> np.ndarray:
        of = spec.storage
        known = declared.setdefault(of.key, of)
        if (known.dtype, known.numel) != (of.dtype, of.numel):
            raise TorchFileError(
                f"it describes storage {of.key[:40]!r} in two ways; download the file again"
            )
        return np.empty(0, spec.dtype)

    _, length = read_pickle(pickle, note_storage)
    keys, at = _read_plain(file, at + length)
    storages = _read_storages(file, at, keys, declared)

    def make_tensor(spec: TensorSpec) -> np.ndarray:
        return tensor_view(spec, storages[spec.storage.key])

    value, _ = read_pickle(pickle, make_tensor)
    return value


def _read_plain(file: memoryview, at: int) -> tuple[Any, int]:
    """Reads the pickle at `at`, which must have no tensors, and returns where it ends too."""

    def refuse(spec: TensorSpec) -> np.ndarray:
        raise TorchFileError("it has a tensor in its header; download the file again")

    value, length = read_pickle(bytes(file[at : at + MAX_PICKLE_BYTES]), refuse)
    return value, at + length


def _read_storages(
    file: memoryview, at: int, keys: Any, declared: dict[str, Storage]
) -> dict[str, np.ndarray]:
    """The bytes of each storage, uint8 [n], from `at` to the end of the file."""
    if not (type(keys) is list and all(type(key) is str for key in keys)) or (
        sorted(keys) != sorted(declared)
    ):
        raise TorchFileError("its storages do not match its tensors; download the file again")
    storages = {}
    for key in keys:
        of = declared[key]
        first, last = at + _COUNT.size, at + _COUNT.size + of.numel * of.dtype.itemsize
        if last > len(file):
            raise TorchFileError(
                f"truncated: it should have {last} bytes but has {len(file)}; download it again"
            )
        if _COUNT.unpack_from(file, at)[0] != of.numel:
            raise TorchFileError(
                f"storage {key[:40]!r} does not have the length in its pickle; download it again"
            )
        storages[key] = storage_bytes(file[first:last], of.dtype)
        at = last
    if at != len(file):
        raise TorchFileError(f"{len(file) - at} bytes follow its last tensor; download it again")
    return storages
