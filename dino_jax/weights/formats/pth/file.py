"""Reads `.pth` files without torch, as plain data, without running any code from them."""

import mmap
from pathlib import Path
from typing import Any

from dino_jax.errors import TorchFileError
from dino_jax.paths import local_path
from dino_jax.weights.formats.pth.legacy import LEGACY_MAGIC, read_legacy
from dino_jax.weights.formats.pth.zip import ZIP_MAGIC, read_zip

_START = 512  # bytes that identify the type of a file


def read_torch_file(path: str | Path) -> Any:
    """Reads a file written by `torch.save`, in the zip format or the legacy format.

    Tensors are read-only views of the memory-mapped file: they use no memory of their own, and the
    file must not change while they are in use. Checksums are verified if the format has them.

    Args:
      path: the file.
    Returns: the saved object as plain data: dict (also for OrderedDict and `argparse.Namespace`),
      list, tuple (also for torch.Size), str (also for devices and dtypes), numbers, bytes, None,
      and for each tensor or parameter a NumPy array of its shape and dtype (ml_dtypes.bfloat16 for
      bfloat16).
    Raises:
      UsageError: the path is an address, or names an unknown user.
      TorchFileError: the file is missing, damaged or not written by `torch.save`, or contains more
        than plain data and dense tensors.

    Example:
      state_dict = read_torch_file("dino_deitsmall16_pretrain.pth")
      state_dict["cls_token"].shape  # (1, 1, 384)
    """
    located = local_path(path, "weights")
    try:
        return _read(_mapped(located))
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error


def _mapped(path: Path) -> memoryview:
    """Memory-maps a file."""
    try:
        if not path.exists():
            raise TorchFileError("no such file; check the path")
        if not path.is_file():
            raise TorchFileError("a folder or a device, not a file; give the path of the .pth file")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise TorchFileError("an empty file; download it again")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise TorchFileError(f"it cannot be read: {error}") from error


def _read(file: memoryview) -> Any:
    start = bytes(file[:_START])
    if start.startswith(ZIP_MAGIC):
        return read_zip(file)
    if start.startswith(LEGACY_MAGIC):
        return read_legacy(file)
    raise TorchFileError(_what_it_is(start))


def _what_it_is(start: bytes) -> str:
    """Describes a file that `torch.save` did not write, from its first bytes."""
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; check the address and download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; run `git lfs pull`"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "a safetensors file; give the .pth file, or save its tensors with torch.save"
    if start[257:262] == b"ustar":
        return (
            "a tar archive, the format of torch 0.1; download a newer file of these weights, or "
            "load it with torch and save it again"
        )
    if LEGACY_MAGIC.startswith(start) or ZIP_MAGIC.startswith(start):
        return "truncated after a few bytes; download it again"
    for magic, kind in _OTHERS.items():
        if start.startswith(magic):
            return f"{kind}, not written by torch.save; {_WAYS_OUT.get(kind, _DEFAULT)}"
    if b"pytorch" in start or b"onnx" in start or b"ir_version" in start:
        return f"an ONNX file, not written by torch.save; {_DEFAULT}"
    if start.startswith(b"\x80"):
        return "a pickle that torch.save did not write; save its tensors with torch.save"
    return f"not written by torch.save: it starts with {start[:8]!r}; check the path"


_DEFAULT = "give the .pth file, or save its tensors with torch.save"
_OTHERS = {  # by the first bytes
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"{": "a JSON file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document",
}
_WAYS_OUT = {kind: "unpack it first" for kind in _OTHERS.values() if kind.endswith("archive")}
