"""Released models by name, and their files in the user's cache."""

import contextlib
import dataclasses
import difflib
import hashlib
import os
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Literal

from dino_jax.cache import cache_folder, make_private
from dino_jax.checkpoints import lock
from dino_jax.errors import UsageError
from dino_jax.output import whole_or_nothing
from dino_jax.paths import local_path
from dino_jax.weights.download import DownloadError, download, is_safe

Kind = Literal["backbone", "full", "linear"]

ADDRESS = "https://dl.fbaipublicfiles.com/dino"
_SUFFIXES: dict[Kind, str] = {  # of the published file names
    "backbone": "_pretrain.pth",
    "full": "_pretrain_full_checkpoint.pth",
    "linear": "_linearweights.pth",
}
_LIMITS: dict[Kind, int] = {  # bytes; the largest released files have 0.35, 1.8 and 0.01 GB
    "backbone": 1 << 30,
    "full": 4 << 30,
    "linear": 64 << 20,
}
_MAGIC = (b"PK", b"\x80")  # zip file, torch's format since 1.6; pickle, its format before that


@dataclasses.dataclass(frozen=True)
class Released:
    """A released model. Scores are top-1 accuracies in percent on the ImageNet validation set."""

    arch: str  # a key of `models.MODELS`
    patch_size: int | None  # pixels; None for a ResNet
    stem: str  # its files are STEM_pretrain/STEM*
    knn: float | None = None
    linear: float | None = None
    kinds: tuple[Kind, ...] = ("backbone", "full", "linear")  # the released files

    def path(self, kind: Kind) -> str:
        """The path of a file, relative to `ADDRESS`, a mirror or the cache."""
        return f"{self.stem}_pretrain/{self.stem}{_SUFFIXES[kind]}"

    def url(self, kind: Kind) -> str:
        """The address at which a file was published."""
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
    # The model in the paper's figures.
    "dino_vits8_300ep": Released(
        "vit_small", 8, "dino_deitsmall8_300ep", kinds=("backbone", "full")
    ),
    # Trained on Google Landmarks, for retrieval.
    "dino_vits16_landmarks": Released(
        "vit_small", 16, "dino_vitsmall16_googlelandmark", kinds=("backbone",)
    ),
}


def released(name: str) -> Released:
    """Looks up a released model by name.

    Raises:
      UsageError: the name is unknown.
    """
    if name not in RELEASED:
        close = difflib.get_close_matches(name, RELEASED, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown hub name {name!r}: {meant}choose one of {', '.join(RELEASED)}")
    return RELEASED[name]


def fetch(name: str, what: Kind = "backbone") -> Path:
    """Returns the path of a released file. Downloads the file on first use.

    Files are cached in `cache.cache_folder()`, which is private to the user. Cached files, and
    files that the user has copied there, are used without network access.

    The published files have no checksums, so the first download is trusted as far as https
    authenticates the server. Its SHA-256 is recorded next to it (`FILE.sha256`, in the format of
    `sha256sum`) and checked by every later call.

    The environment variable `DINO_JAX_HUB` selects a mirror with the same folder structure: an
    https address, an http address of this machine, or a folder. Files in a folder are used in
    place, and checked against `FILE.sha256` if it exists.

    Args:
      name: a key of `RELEASED`.
      what: "backbone" (the teacher's), "full" (the full training state) or "linear" (the linear
        classifier trained on the frozen backbone).
    Returns: the path of a `.pth` file.
    Raises:
      UsageError: the name is unknown, the file was not released, `DINO_JAX_HUB` is invalid, or the
        file cannot be downloaded, is not a checkpoint, or has changed.
    """
    model = released(name)
    if what not in model.kinds:
        raise UsageError(f"{name} has no file {what!r}: choose one of {', '.join(model.kinds)}")
    mirror, url = _mirror(), model.url(what)
    path = (mirror if isinstance(mirror, Path) else cache_folder()) / model.path(what)
    try:
        if isinstance(mirror, Path):
            _check_mirrored(path, url)
        elif path.exists() and _hash_file(path).exists():
            _check_hash(path)
        else:
            _add_to_cache(path, f"{mirror}/{model.path(what)}", url, limit=_LIMITS[what])
    except DownloadError as error:
        raise UsageError(
            f"{error}. Download {url} to {path} yourself, or set DINO_JAX_HUB "
            f"({'now ' + mirror if mirror != ADDRESS else 'not set'}) to a mirror: an https "
            f"address or a folder that contains {model.path(what)}"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{error}; set DINO_JAX_CACHE to another cache folder, or DINO_JAX_HUB to "
            "another mirror"
        ) from error
    return path


def _mirror() -> str | Path:
    """The source of the files: an address without a trailing slash, or a folder."""
    value = os.environ.get("DINO_JAX_HUB") or ADDRESS
    if "://" not in value:
        folder = local_path(value, "DINO_JAX_HUB")
    elif value.startswith("file:///"):
        folder = Path(urllib.request.url2pathname(value.removeprefix("file://")))
    else:
        _check_address(value)
        return value.rstrip("/")
    if not folder.is_dir():
        raise UsageError(
            f"DINO_JAX_HUB={value!r} is not a folder: set it to a folder or an https address, or "
            "unset it"
        )
    return folder


def _check_address(value: str) -> None:
    """Rejects addresses that are unsafe, or to which a path cannot be appended."""
    rule = (
        "must be an https address, an http address of this machine (127.0.0.1, ::1, localhost) or "
        "a folder; or unset it"
    )
    try:
        parts = urllib.parse.urlsplit(value)
        _ = parts.port  # raises unless it is a number
    except ValueError as error:
        raise UsageError(f"DINO_JAX_HUB={value!r} {rule} ({error})") from error
    if "@" in parts.netloc:  # the address is not printed, because it contains a password
        raise UsageError(
            f"DINO_JAX_HUB contains a user or password for {parts.hostname}, which would be sent "
            "and logged unencrypted: use the address without them, or a folder"
        )
    if not parts.hostname or parts.query or parts.fragment or not is_safe(value):
        raise UsageError(f"DINO_JAX_HUB={value!r} {rule}")


def _check_mirrored(path: Path, url: str) -> None:
    """Checks that a mirror folder contains `path`, and verifies its hash if one is recorded."""
    if not path.is_file():
        raise UsageError(f"DINO_JAX_HUB lacks {path}: put {url} there, or unset DINO_JAX_HUB")
    _check_magic(path, url)
    if _hash_file(path).exists():
        _check_hash(path)


def _add_to_cache(path: Path, source: str, url: str, *, limit: int) -> None:
    """Downloads a file if it is missing, and records its hash; one process at a time."""
    make_private(path.parent)
    with contextlib.closing(lock.wait_for(Path(f"{path}.lock"))):
        if not path.exists():
            with whole_or_nothing(path) as part:
                download(source, part, limit=limit)
                if not (start := _start_of(part)).startswith(_MAGIC):
                    raise DownloadError(
                        f"{source} is not a checkpoint: it starts with {start!r}; the network may "
                        "require a login first"
                    )
                # Before the rename: a file without a hash is taken for a copy made by the user.
                _record_hash(part, path)
        elif not _hash_file(path).exists():
            _check_magic(path, url)
            _record_hash(path, path)
        else:  # another process has downloaded it in the meantime
            _check_hash(path)


def _hash_file(path: Path) -> Path:
    return Path(f"{path}.sha256")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_hash(content: Path, path: Path) -> None:
    """Writes the hash of the file `content` as the hash of `path`."""
    with whole_or_nothing(_hash_file(path)) as part:
        part.write_text(f"{sha256_of(content)}  {path.name}\n")


def _check_hash(path: Path) -> None:
    recorded = _hash_file(path).read_text(errors="replace").partition(" ")[0]
    found = sha256_of(path)
    if recorded != found:
        raise UsageError(
            f"{path} has changed since its first use: its SHA-256 is {found}, but {recorded} was "
            f"recorded; delete the file to download it again, or delete {path.name}.sha256 if you "
            "changed it on purpose"
        )


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _check_magic(path: Path, url: str) -> None:
    if not (start := _start_of(path)).startswith(_MAGIC):
        raise UsageError(
            f"{path} is not a checkpoint: it starts with {start!r}; replace it with {url}"
        )
