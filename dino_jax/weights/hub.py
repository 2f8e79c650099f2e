"""The released models by name: what they are, where they lie, and their files on this machine."""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import logging
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dino_jax.cache import cache_folder, make_private
from dino_jax.errors import UsageError
from dino_jax.weights.download import DownloadError, download, forget, is_safe

Kind = Literal["backbone", "full", "linear"]

ADDRESS = "https://dl.fbaipublicfiles.com/dino"
_ENDINGS: dict[Kind, str] = {  # of the file's name
    "backbone": "_pretrain.pth",
    "full": "_pretrain_full_checkpoint.pth",
    "linear": "_linearweights.pth",
}
_LIMITS: dict[Kind, int] = {  # bytes; the largest networks need 0.35, 1.8 and 0.01 GB
    "backbone": 1 << 30,
    "full": 4 << 30,
    "linear": 64 << 20,
}
_MAGIC = (b"PK", b"\x80")  # a zip, or a pickle: torch's format since 1.6, and before


@dataclasses.dataclass(frozen=True)
class Released:
    """A released model. Scores are top-1 in percent on ImageNet's validation images."""

    arch: str  # a key of `models.MODELS`
    patch_size: int | None  # pixels; None for a ResNet
    stem: str  # its files lie in the folder STEM_pretrain, and their names begin with STEM
    knn: float | None = None
    linear: float | None = None
    kinds: tuple[Kind, ...] = ("backbone", "full", "linear")  # the files there are

    def path(self, kind: Kind) -> str:
        """Where the file of a kind lies under `ADDRESS`, and in every mirror and cache."""
        return f"{self.stem}_pretrain/{self.stem}{_ENDINGS[kind]}"

    def url(self, kind: Kind) -> str:
        """The published address of the file of a kind."""
        return f"{ADDRESS}/{self.path(kind)}"


RELEASED = {
    # arch, patch size, stem, k-NN, linear
    "dino_vits16": Released("vit_small", 16, "dino_deitsmall16", 74.5, 77.0),
    "dino_vits8": Released("vit_small", 8, "dino_deitsmall8", 78.3, 79.7),
    "dino_vitb16": Released("vit_base", 16, "dino_vitbase16", 76.1, 78.2),
    "dino_vitb8": Released("vit_base", 8, "dino_vitbase8", 77.4, 80.1),
    "dino_xcit_small_12_p16": Released(
        "xcit_small_12_p16", 16, "dino_xcit_small_12_p16", 76.0, 77.8
    ),
    "dino_xcit_small_12_p8": Released("xcit_small_12_p8", 8, "dino_xcit_small_12_p8", 77.1, 79.2),
    "dino_xcit_medium_24_p16": Released(
        "xcit_medium_24_p16", 16, "dino_xcit_medium_24_p16", 76.4, 78.8
    ),
    "dino_xcit_medium_24_p8": Released(
        "xcit_medium_24_p8", 8, "dino_xcit_medium_24_p8", 77.9, 80.3
    ),
    "dino_resnet50": Released("resnet50", None, "dino_resnet50", 67.5, 75.3),
    # The model of the paper's pictures.
    "dino_vits8_300ep": Released(
        "vit_small", 8, "dino_deitsmall8_300ep", kinds=("backbone", "full")
    ),
    # Trained on Google Landmarks, for retrieval.
    "dino_vits16_landmarks": Released(
        "vit_small", 16, "dino_vitsmall16_googlelandmark", kinds=("backbone",)
    ),
}


def find(name: str) -> Released:
    """The released model of this name.

    Raises:
      UsageError: there is none.
    """
    if name not in RELEASED:
        close = difflib.get_close_matches(name, RELEASED, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown hub name {name!r}: {meant}choose one of {', '.join(RELEASED)}")
    return RELEASED[name]


def fetch(name: str, what: Kind = "backbone") -> Path:
    """The file of a released model on this machine, downloaded if it is not there yet.

    Files are kept in `cache.cache_folder()`, private to the user. Once a file is there nothing is
    asked of the network. One that was put there by hand serves as well.

    The published files come without checksums, so the first copy is trusted, as far as https
    vouches for its sender. Its SHA-256 is written beside it (`FILE.sha256`, in the format of
    `sha256sum`), and every later call compares it.

    The environment variable `DINO_JAX_HUB` names another place to fetch from, which holds the same
    folders: an https address, an http address of this machine, or a folder, whose files are used
    where they are (and compared with `FILE.sha256` where there is one).

    Args:
      name: a key of `RELEASED`.
      what: "backbone" (the teacher's), "full" (the state of the training run) or "linear" (the
        classifier over the frozen backbone).
    Returns: the path of a `.pth` file.
    Raises:
      UsageError: an unknown name, a file that was not released, a `DINO_JAX_HUB` that cannot be
        used, a file that cannot be downloaded, is no checkpoint, or has changed.
    """
    model = find(name)
    if what not in model.kinds:
        raise UsageError(f"{name} has no file {what!r}: choose one of {', '.join(model.kinds)}")
    mirror = _mirror()
    path = (mirror if isinstance(mirror, Path) else cache_folder()) / model.path(what)
    try:
        if isinstance(mirror, Path):
            _check_mirrored(path, model.url(what))
        elif path.exists() and _hash_file(path).exists():
            _check_hash(path)
        else:
            _admit(path, f"{mirror}/{model.path(what)}", limit=_LIMITS[what])
    except DownloadError as error:
        raise UsageError(
            f"{error}. By hand: put the file {model.url(what)} at {path}, or let DINO_JAX_HUB "
            f"({'now ' + mirror if mirror != ADDRESS else 'not set'}) name a mirror: an https "
            f"address or a folder that holds {model.path(what)}"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{error}; DINO_JAX_CACHE names another folder for caches, DINO_JAX_HUB another mirror"
        ) from error
    return path


def _mirror() -> str | Path:
    """Where files come from: an address without a slash at the end, or a folder."""
    value = os.environ.get("DINO_JAX_HUB") or ADDRESS
    if "://" not in value:
        folder = Path(os.path.expanduser(value))
    elif value.startswith("file:///"):
        folder = Path(urllib.request.url2pathname(value.removeprefix("file://")))
    else:
        _check_address(value)
        return value.rstrip("/")
    if not folder.is_dir():
        raise UsageError(
            f"DINO_JAX_HUB={value!r} is not a folder: give one, an https address, or unset it"
        )
    return folder


def _check_address(value: str) -> None:
    """Raises unless paths can be added to an address and asked for in safety."""
    rule = (
        "must be an https address, an http address of this machine (127.0.0.1, ::1, localhost) or "
        "a folder; or unset it"
    )
    try:
        parts = urllib.parse.urlsplit(value)
        _ = parts.port  # raises if it is no number
    except ValueError as error:
        raise UsageError(f"DINO_JAX_HUB={value!r} {rule} ({error})") from error
    if "@" in parts.netloc:  # not shown: it holds a password
        raise UsageError(
            f"DINO_JAX_HUB names a user or password for {parts.hostname}, which would be sent and "
            "logged in the clear: give the address without, or a folder"
        )
    if not parts.hostname or parts.query or parts.fragment or not is_safe(value):
        raise UsageError(f"DINO_JAX_HUB={value!r} {rule}")


def _check_mirrored(path: Path, url: str) -> None:
    """Raises unless a folder holds `path`, unchanged if a hash lies beside it."""
    if not path.is_file():
        raise UsageError(f"DINO_JAX_HUB lacks {path}: put {url} there, or unset DINO_JAX_HUB")
    _check_magic(path)
    if _hash_file(path).exists():
        _check_hash(path)


def _admit(path: Path, url: str, *, limit: int) -> None:
    """Brings a file with its hash into the cache; one process at a time."""
    make_private(path.parent)
    with _locked(path):
        if not path.exists():
            part = Path(f"{path}.part")
            download(url, part, limit=limit, magic=_MAGIC)
            _write_hash(part, path)  # first: a file without a hash is one put there by hand
            os.replace(part, path)
            forget(part)
        elif not _hash_file(path).exists():
            _check_magic(path)
            _write_hash(path, path)
        else:  # another process has been faster
            _check_hash(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out; the kernel ends the lock with the process, however it ends."""
    with Path(f"{path}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("another process is fetching %s: waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash_file(path: Path) -> Path:
    return Path(f"{path}.sha256")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_hash(source: Path, path: Path) -> None:
    """Notes the hash of what `source` holds as that of `path`, at once or not at all."""
    draft = Path(f"{path}.sha256.part")
    draft.write_text(f"{sha256_of(source)}  {path.name}\n")
    os.replace(draft, _hash_file(path))


def _check_hash(path: Path) -> None:
    recorded = _hash_file(path).read_text(errors="replace").partition(" ")[0]
    found = sha256_of(path)
    if recorded != found:
        raise UsageError(
            f"{path} has changed since it was first used: SHA-256 {found}, recorded {recorded}; "
            f"delete it and fetch it again, or, if you changed it, delete {path.name}.sha256"
        )


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(16)
    if not begin.startswith(_MAGIC):
        raise UsageError(
            f"{path} is no checkpoint: it begins with {begin!r}; delete it and fetch it again"
        )
