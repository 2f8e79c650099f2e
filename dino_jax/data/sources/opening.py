"""Opens the image source that a text `KIND:LOCATION[@SPLIT]` names."""

import os
import re
from collections.abc import Callable

from dino_jax.data.sources.folder import open_folder
from dino_jax.data.sources.idx import open_idx
from dino_jax.data.sources.records import open_records
from dino_jax.data.sources.shapes import open_shapes
from dino_jax.data.sources.source import EncodedSource
from dino_jax.data.sources.subset import Subset
from dino_jax.data.sources.tfds import open_tfds
from dino_jax.errors import UsageError
from dino_jax.paths import local_path

_SLICE = re.compile(r"(?P<spec>.+)\[(\d*):(\d*)\]")
_KINDS: dict[str, Callable[[str, str | None], EncodedSource]] = {
    "folder": open_folder,
    "idx": open_idx,
    "records": open_records,
    "shapes": open_shapes,
    "tfds": open_tfds,
}


def open_source(spec: str) -> EncodedSource:
    """Opens an image source.

    Args:
      spec: `folder:/path`, `records:/path`, `idx:/path@train`, `tfds:name@train`,
        `shapes:4000@train`; a bare path is a folder. The split of a folder or of records is a
        sub-folder. A final `[a:b]` slices any source as Python slices a list, without negative
        numbers.

    Returns:
      The source; no image has been decoded yet.

    Raises:
      UsageError: unknown kind, missing or empty location, unknown split, or no permission to read.
    """
    try:
        return _open(spec)
    except OSError as error:
        raise UsageError(f"source {spec!r} cannot be read: {error.strerror or error}") from error


def _is_path(spec: str) -> bool:
    """Whether a text that ends like a slice is the path of an existing folder, or of a split."""
    location = os.path.expanduser(re.sub(r"^(folder|idx|records):", "", spec))
    base, _, split = location.rpartition("@")
    return os.path.exists(location) or (bool(base) and os.path.exists(os.path.join(base, split)))


def _open(spec: str) -> EncodedSource:
    # tfds has slices of its own, which can do more.
    part = None if spec.startswith("tfds:") or _is_path(spec) else _SLICE.fullmatch(spec)
    if part:
        source = _open(part["spec"])
        records = range(len(source))[slice(*(int(n) if n else None for n in part.group(2, 3)))]
        if not records:
            raise UsageError(
                f"source {spec!r} is empty: choose a slice of the {len(source)} images in "
                f"{part['spec']}"
            )
        return Subset(source, records, f"{records.start}:{records.stop}")
    kind, colon, location = spec.partition(":")
    if not colon or not re.fullmatch(r"\w+", kind) or _exists(spec):
        kind, location = "folder", spec
    if kind not in _KINDS:
        if location.startswith("//"):
            local_path(spec, "source")  # raises, as it is an address
        raise UsageError(
            f"source {spec!r}: unknown kind {kind!r}; choose one of {', '.join(_KINDS)} "
            "(write a path that contains a colon as folder:PATH)"
        )
    split = None
    if "@" in location and not _exists(location):
        location, _, split = location.rpartition("@")
    if not location:
        raise UsageError(f"source {spec!r} has no location; write KIND:LOCATION[@SPLIT]")
    return _KINDS[kind](location, split)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))
