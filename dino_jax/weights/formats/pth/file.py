"""Reads `.pth` files without torch, as plain data, and runs nothing that they hold."""

import mmap
import os
from pathlib import Path
from typing import Any

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.legacy import LEGACY_MAGIC, read_legacy
from dino_jax.weights.formats.pth.zip import ZIP_MAGIC, read_zip

_LOOK = 512  # bytes that tell what a file is


def read_torch_file(path: str | Path) -> Any:
    """Reads a file of `torch.save`, in the zip format or the one before it.

    Tensors are read-only views of the mapped file: they take no memory of their own, and the file
    must not be changed while they are in use. Checksums are verified where the format has them.

    Args:
      path: the file.
    Returns: what was saved, as plain data: dict (also for OrderedDict and `argparse.Namespace`),
      list, tuple (also for torch.Size), str (also for devices and dtypes), numbers, bytes, None,
      and for each tensor or parameter a NumPy array of its shape and dtype (bfloat16 is
      ml_dtypes.bfloat16).
    Raises:
      TorchFileError: there is no such file; it is damaged, or not one of `torch.save`; or it asks
        for anything beyond plain data and dense tensors.

    Example:
      state_dict = read_torch_file("dino_deitsmall16_pretrain.pth")
      state_dict["cls_token"].shape  # (1, 1, 384)
    """
    try:
        return _read(_mapped(Path(os.path.expanduser(path))))
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error


def _mapped(path: Path) -> memoryview:
    """The bytes of a file, read when they are used."""
    try:
        if not path.exists():
            raise TorchFileError("no such file; check the path")
        if not path.is_file():
            raise TorchFileError("a folder or a device, not a file; give the .pth file itself")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise TorchFileError("an empty file; fetch it again")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise TorchFileError(f"it cannot be read: {error}") from error


def _read(file: memoryview) -> Any:
    start = bytes(file[:_LOOK])
    if start.startswith(ZIP_MAGIC):
        return read_zip(file)
    if start.startswith(LEGACY_MAGIC):
        return read_legacy(file)
    raise TorchFileError(_what_it_is(start))


def _what_it_is(start: bytes) -> str:
    """A sentence on a file that is not of `torch.save`, from its first bytes."""
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: the download failed; check the address and fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the weights themselves; run `git lfs pull`"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "a safetensors file; give the .pth file, or save its tensors with torch.save"
    if start[257:262] == b"ustar":
        return (
            "a tar archive, as torch 0.1 wrote: fetch a newer file of these weights, or load and "
            "save it on a machine with torch"
        )
    if LEGACY_MAGIC.startswith(start) or ZIP_MAGIC.startswith(start):
        return "cut short after a few bytes; fetch it again"
    if start.startswith(b"\x80"):
        return "a pickle, but not one of torch.save; save its tensors with torch.save"
    return f"not a file of torch.save: it begins with {start[:8]!r}; check what it is"
