"""Where pictures come from: `KIND:LOCATION[@SPLIT]` names a source, `open_source` opens it."""

import re
from collections.abc import Callable
from pathlib import Path

from dino_jax.data.sources.folder import open_folder
from dino_jax.data.sources.idx import open_idx
from dino_jax.data.sources.records import open_records
from dino_jax.data.sources.shapes import open_shapes
from dino_jax.data.sources.source import EncodedSource
from dino_jax.data.sources.subset import Subset
from dino_jax.data.sources.tfds import open_tfds
from dino_jax.errors import UsageError

_SLICE = re.compile(r"(?P<spec>.+)\[(\d*):(\d*)\]")
_KINDS: dict[str, Callable[[str, str | None], EncodedSource]] = {
    "folder": open_folder,
    "idx": open_idx,
    "records": open_records,
    "shapes": open_shapes,
    "tfds": open_tfds,
}


def open_source(spec: str) -> EncodedSource:
    """Opens a source of pictures.

    Args:
      spec: `folder:/path`, `records:/path`, `idx:/path@train`, `tfds:name@train`,
        `shapes:4000@train`; a bare path is a folder. For folder and records the split is a
        sub-folder of that name. `[a:b]` at the end takes the images from a, or the first, to b, or
        the last, of any source.

    Returns:
      The source. No picture has been decoded.

    Raises:
      UsageError: unknown kind, missing or empty location, split that does not exist, or no right
        to read it.
    """
    try:
        return _open(spec)
    except OSError as error:
        raise UsageError(f"source {spec!r} cannot be read: {error.strerror or error}") from error


def _open(spec: str) -> EncodedSource:
    # tfds slices by itself, and in more ways.
    if (part := _SLICE.fullmatch(spec)) and not spec.startswith("tfds:"):
        source = _open(part["spec"])
        records = range(len(source))[slice(*(int(n) if n else None for n in part.group(2, 3)))]
        if not records:
            raise UsageError(f"source {spec!r} is empty: {part['spec']} has {len(source)} records")
        return Subset(source, records, f"{records.start}:{records.stop}")
    kind, colon, location = spec.partition(":")
    if not colon or not re.fullmatch(r"\w+", kind) or Path(spec).exists():
        kind, location = "folder", spec
    if kind not in _KINDS:
        raise UsageError(
            f"source {spec!r}: unknown kind {kind!r}; the kinds are {', '.join(_KINDS)} "
            "(a path that contains a colon is written folder:PATH)"
        )
    split = None
    if "@" in location and not Path(location).exists():
        location, _, split = location.rpartition("@")
    if not location:
        raise UsageError(f"source {spec!r} names no location; write KIND:LOCATION[@SPLIT]")
    return _KINDS[kind](location, split)
