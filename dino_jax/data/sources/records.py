"""`records:/path[@SPLIT]`: a folder written by `python -m dino_jax pack`.

It contains ArrayRecord files, whose records are the encoded images in order; `index.npz` with
`labels` [N] int32 (-1 for none), all names as one block of bytes (`names`) and the end of each name
in it (`name_ends`); and `records.json`, which lists the files and the class names.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from dino_jax.data.decode import open_image
from dino_jax.data.sources.files import file_stamp
from dino_jax.data.sources.names import Names
from dino_jax.errors import UsageError, about
from dino_jax.paths import local_path

LISTING = "records.json"
INDEX = "index.npz"
FORMAT = "dino_jax records"
VERSION = 1

_AGAIN = "copy the folder again, or pack the source again"


class RecordsSource:
    """Encoded images in ArrayRecord files, with labels and names in memory."""

    def __init__(self, root: Path, spec: str) -> None:
        listing = _read_listing(root)
        self.spec = spec
        self.class_names = listing["class_names"] and tuple(listing["class_names"])
        classes, self._names = _read_index(root / INDEX)
        self.labels = classes if (classes >= 0).any() else None
        self._stamp = file_stamp(root / INDEX)
        self._records = _open_shards(root, listing["shards"])
        promised = sum(shard["records"] for shard in listing["shards"])
        found = len(self._records), len(classes), len(self._names)
        if found != 3 * (promised,):
            raise UsageError(
                f"{LISTING} lists {promised} records, but the folder contains {found[0]} records, "
                f"{found[1]} labels and {found[2]} names; {_AGAIN}"
            )

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.encoded(index)))

    def encoded(self, index: int) -> bytes:
        try:
            return self._records[index]
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"record {index} of {self.spec} cannot be read ({reason}); {_AGAIN}"
            ) from error

    def label(self, index: int) -> int:
        return -1 if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def stamp(self, index: int) -> str:
        return f"{self._stamp} {index}"


def open_records(location: str, split: str | None) -> RecordsSource:
    """Opens `records:location[@split]`, where the split is a sub-folder; see `open_source`."""
    root = local_path(location, "source") / (split or "")
    spec = f"records:{location}" + (f"@{split}" if split else "")
    with about(f"source {spec!r}"):
        return RecordsSource(root, spec)


def part_of(folder: Path) -> Path:
    """The path under which a folder is written until it is complete."""
    return folder.with_name(folder.name + ".part")


def _read_listing(root: Path) -> dict[str, Any]:
    path = root / LISTING
    if not path.is_file():
        unfinished = root if root.suffix == ".part" else part_of(root)
        if unfinished.is_dir():
            raise UsageError(
                f"packing was interrupted: remove {unfinished}, which it left behind, and pack "
                "the source again"
            )
        raise UsageError(
            f"{path} does not exist: give a folder written by `python -m dino_jax pack SRC OUT`"
        )
    try:
        listing = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if not isinstance(listing, dict) or listing.get("format") != FORMAT:
        raise UsageError(
            f"{path} does not have the format {FORMAT!r}: give a folder written by "
            "`python -m dino_jax pack SRC OUT`"
        )
    if listing["version"] != VERSION:
        raise UsageError(
            f"{path} has format version {listing['version']}, but this dino_jax reads version "
            f"{VERSION}: use the dino_jax version that packed it, or pack the source again"
        )
    return listing


def _read_index(path: Path) -> tuple[np.ndarray, Names]:
    """Reads the labels [N] int32 and the names."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return arrays["labels"], Names(arrays["names"].tobytes(), arrays["name_ends"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def _open_shards(root: Path, shards: list[dict[str, Any]]) -> ArrayRecordDataSource:
    for shard in shards:
        path = root / shard["file"]
        if not path.is_file():
            raise UsageError(f"{path} is missing; {_AGAIN}")
        if (size := path.stat().st_size) != shard["bytes"]:
            raise UsageError(f"{path} has {size} bytes instead of {shard['bytes']}; {_AGAIN}")
    try:
        return ArrayRecordDataSource([str(root / shard["file"]) for shard in shards])
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"a file in {root} is damaged ({reason}); {_AGAIN}") from error
