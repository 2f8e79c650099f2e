"""The globals that a `.pth` file may name, and the plain data that replaces each of them.

`CALLS`, `STORAGE_DTYPES` and `DTYPES` are the whole allow-list. No name from a file is ever
imported: each call is replaced by a function of this module that takes and returns inert data, and
each type by its NumPy dtype.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dino_jax.errors import TorchFileError

MAX_DIMS = 16  # axes of a tensor; convolutions have 4

_DTYPES_BY_STORAGE = {
    "Double": ("float64", np.float64),
    "Float": ("float32", np.float32),
    "Half": ("float16", np.float16),
    "BFloat16": ("bfloat16", ml_dtypes.bfloat16),
    "Long": ("int64", np.int64),
    "Int": ("int32", np.int32),
    "Short": ("int16", np.int16),
    "Char": ("int8", np.int8),
    "Byte": ("uint8", np.uint8),
    "Bool": ("bool", np.bool_),
}
DTYPES = {
    **{f"torch.{name}": np.dtype(t) for name, t in _DTYPES_BY_STORAGE.values()},
    **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
}
STORAGE_DTYPES = {
    **{f"torch.{kind}Storage": np.dtype(t) for kind, (_, t) in _DTYPES_BY_STORAGE.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    "torch.storage._UntypedStorage": np.dtype(np.uint8),  # the name in torch 1.12
}
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


@dataclasses.dataclass(frozen=True)
class Global:
    """A name on the allow-list, as a value on the stack."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage as described by a pickle, not yet checked against the file."""

    dtype: np.dtype
    key: str  # its name in the file
    numel: int  # elements of the whole storage
    first: int  # the window that tensors can see: its first element
    count: int  # and its number of elements


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as described by a pickle, not yet checked against its storage."""

    storage: Storage
    dtype: np.dtype
    offset: int  # in elements, like the strides
    size: tuple[int, ...]
    stride: tuple[int, ...]


def storage_of(persistent_id: tuple) -> Storage:
    """Reads a persistent id: ("storage", type, key, device, elements[, view])."""
    kind, storage_type, key, _, numel, *rest = persistent_id
    if type(kind) is not str or kind != "storage" or len(rest) > 1:
        raise TorchFileError("it refers to something other than a storage; save the file again")
    if type(storage_type) is not Global or type(key) is not str:
        raise TypeError("a storage without type or key")
    dtype = STORAGE_DTYPES[storage_type.name]
    view = rest[0] if rest else None  # (key, first, count) in the legacy format
    _, first, count = (key, 0, numel) if view is None else view
    if not (_is_count(numel, first, count) and first + count <= numel):
        raise TorchFileError(
            f"storage {key[:40]!r} has an invalid size or window; download the file again"
        )
    return Storage(dtype, key, numel, first, count)


def storage_bytes(content: memoryview, dtype: np.dtype) -> np.ndarray:
    """The bytes of a storage as a uint8 array [n], without a copy."""
    array = np.frombuffer(content, np.uint8)
    if dtype == np.bool_ and array.size and array.max() > 1:  # NumPy relies on this
        raise TorchFileError("it has a bool that is neither 0 nor 1; download the file again")
    return array


def tensor_view(spec: TensorSpec, storage: np.ndarray) -> np.ndarray:
    """Views the bytes of a storage as a tensor, without a copy.

    Args:
      spec: which elements; it is fully validated here.
      storage: [n] uint8, the whole storage.
    Returns: an array of shape spec.size and dtype spec.dtype that shares memory with `storage`.
    Raises:
      TorchFileError: the tensor exceeds its storage, or has more elements.
    """
    size, stride, itemsize = spec.size, spec.stride, spec.dtype.itemsize
    unit = spec.storage.dtype.itemsize
    window = storage[spec.storage.first * unit :][: spec.storage.count * unit]
    if not (
        type(size) is type(stride) is tuple
        and len(size) == len(stride) <= MAX_DIMS
        and _is_count(spec.offset, *size, *stride)
    ):
        raise TorchFileError(
            "it has a tensor whose sizes, strides or offset are not non-negative integers for at "
            f"most {MAX_DIMS} axes; download the file again, or save it again with torch"
        )
    capacity = len(window) // itemsize
    if 0 in size:
        if math.prod(n or 1 for n in size) > 2**40:
            raise TorchFileError("it has an empty tensor of an invalid shape; download it again")
        return np.empty(size, spec.dtype)
    if math.prod(size) > capacity:
        raise TorchFileError(
            f"it has a tensor of {_short(math.prod(size))} elements on a storage of {capacity}; "
            "download the file again, or save the tensor with .contiguous() if it was expanded"
        )
    last = spec.offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= capacity:
        raise TorchFileError(
            f"it has a tensor that reaches element {_short(last)} of a storage of {capacity}; "
            "download the file again"
        )
    # An axis with one element may have any stride, even one that is too large for NumPy.
    strides = [s * itemsize if n > 1 else 0 for n, s in zip(size, stride, strict=True)]
    return np.ndarray(size, spec.dtype, window, spec.offset * itemsize, strides)


def refusal(name: str) -> TorchFileError:
    """The error for a global that is not on the allow-list."""
    for part, kind in _KINDS_REFUSED.items():
        if part in name:
            return TorchFileError(
                f"it contains {kind} ({name[:200]!r}), which are not supported; save it again "
                "with torch as plain dense tensors"
            )
    if ".distributed." in name or "DTensor" in name:
        return TorchFileError(
            f"it contains tensors of several processes ({name[:200]!r}); save it again with torch "
            "after `.full_tensor()`"
        )
    return TorchFileError(
        f"it asks for {name[:200]!r}, but only plain data and tensors are allowed; nothing in it "
        "was run. If you trust the source of the file, load it with torch and save the tensors "
        "alone: torch.save(model.state_dict(), FILE)"
    )


_KINDS_REFUSED = {
    "omplex": "complex numbers",
    "QInt": "quantised tensors",
    "QUInt": "quantised tensors",
    "_rebuild_qtensor": "quantised tensors",
    "_rebuild_sparse": "sparse tensors",
    "_rebuild_meta_tensor": "tensors without values",
    "loat8": "8-bit floating-point numbers",
    "loat4": "4-bit floating-point numbers",
    "_load_from_bytes": "files within the file",
}


def _is_count(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)  # excludes bool


def _short(value: int) -> str:
    """Formats a number that may have hundreds of digits."""
    return str(value) if value < 2**63 else "more than 2**63"


def _tensor(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: np.dtype | None = None,
) -> TensorSpec:
    if type(storage) is not Storage:
        raise TypeError("a tensor without a storage")
    if metadata is not None and not (
        type(metadata) is dict and not metadata
    ):  # lazily negated or conjugated: the stored values differ from the tensor's
        raise TorchFileError("it has a tensor with a lazy negation; save it with .resolve_neg()")
    return TensorSpec(storage, dtype or storage.dtype, offset, size, stride)


def _tensor_of_dtype(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: str,
    metadata: Any = None,
) -> TensorSpec:
    if type(dtype) is not str or dtype == "torch.bool":  # bool bytes need a check
        raise TypeError("bytes viewed as another dtype")
    return _tensor(storage, offset, size, stride, metadata=metadata, dtype=DTYPES[dtype])


def _parameter(
    tensor: np.ndarray, requires_grad: bool = True, hooks: Any = None, state: Any = None
) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise TypeError("a parameter that is not a tensor")
    return tensor


def _ordered_dict(items: list = ()) -> dict:  # Python 2 passed the items here
    if type(items) not in (list, tuple):
        raise TypeError("a dict made of something other than pairs")
    return {dict_key(key): value for key, value in items}


def dict_key(key: Any) -> str | int:
    """Returns `key` if it is allowed; hashing a deep tuple could overflow the C stack."""
    if type(key) is str or (type(key) is int and abs(key) < 2**63):
        return key
    raise TorchFileError(
        f"it has a dict with a key of type {type(key).__name__}; use strings or integers"
    )


def _namespace() -> dict:
    return {}  # its attributes follow as its state


def _size(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if type(sizes) is not tuple or not _is_count(*sizes):
        raise TypeError("a size that does not consist of numbers")
    return sizes


def _device(kind: str, index: int | None = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise TypeError("a device without a name or number")
    return kind if index is None else f"{kind}:{index:d}"


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise TypeError("bytes not in the form that protocol 2 writes")
    return text.encode("latin1")


def _numpy_dtype(code: str, align: Any = False, copy: Any = True) -> np.dtype:
    if type(code) is not str or code not in _NUMPY_CODES:
        raise TorchFileError("it has a NumPy value that is not a number; save it as plain Python")
    return np.dtype(f"<{code}")


def _numpy_scalar(dtype: np.dtype, content: bytes) -> int | float | bool:
    if not isinstance(dtype, np.dtype) or type(content) is not bytes:
        raise TypeError("a NumPy number without a dtype or bytes")
    return np.frombuffer(content, dtype).reshape(()).item()


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": _namespace,
    "_codecs.encode": _bytes,
    "__builtin__.bytes": _bytes,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
