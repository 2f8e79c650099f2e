"""The job that packs an image source into a few large files."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm
from tyro.conf import Positional

from dino_jax.data.decode import UnreadableImage
from dino_jax.data.sources import EncodedSource, open_source, records
from dino_jax.data.sources.names import Names
from dino_jax.errors import UsageError
from dino_jax.paths import local_paths

# One record per chunk, so that each can be read alone. Compression would not shrink a JPEG file.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@local_paths
def pack(
    source: Positional[str],
    out: Positional[Path],
    shard_size: int = 1024,
    num_threads: int = 16,
) -> dict[str, int]:
    """Packs images into a few large files, for file systems that are slow with many small ones.

    Image files are stored byte for byte, with their labels, class names and names. Read them as
    records:OUT; training on it sees the same batches as on the source. Images that the source has
    only as pixels (idx, shapes) become PNG files. Broken files are kept, so every image keeps its
    index.

    Args:
      source: The images: folder:/path, tfds:NAME@train, idx:/path@train, ...
      out: The folder to write; it must not exist yet.
      shard_size: MiB of images per file. Reading keeps all files open, so increase it if there
        would be more than about 500 files.
      num_threads: Number of reading threads.

    Returns: the numbers of `images`, of `missing` ones (their files could not be read), and of
      `shards`.
    Raises:
      UsageError: the source cannot be opened or read, or OUT exists or cannot be written.
    """
    if shard_size < 1:
        raise UsageError(f"shard_size={shard_size} must be at least 1 MiB")
    if num_threads < 1:
        raise UsageError(f"num_threads={num_threads} must be at least 1")
    part = records.part_of(out)
    if out.exists():
        raise UsageError(f"out={out} already exists: remove it, or choose another folder")
    import grain  # slow to import, and --help does not need it

    opened = open_source(source)
    missing: list[int] = []

    def read(index: int) -> bytes:
        try:
            return opened.encoded(index)
        except UnreadableImage as error:
            logging.warning("unreadable image %s: %s", opened.name(index), error)
            missing.append(index)
            return b""

    # Threads read ahead; records are written in order.
    contents = grain.MapDataset.source(range(len(opened))).map(read)
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    try:
        part.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(
            f"out={out}: {part} is left over from an interrupted `pack`, or another `pack` is "
            "writing it; remove it, or choose another folder"
        ) from error
    except OSError as error:
        raise UsageError(f"out={out} cannot be written: {error}; choose another folder") from error
    try:  # this call created the folder, so it may remove it
        with tqdm(total=len(opened), desc=opened.spec, unit=" images") as bar:
            shards = _write_shards(contents.to_iter_dataset(ahead), part, shard_size * 2**20, bar)
        _write_index(opened, part)
        _write_listing(opened, shards, part)  # last: it marks the folder as complete
        part.rename(out)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{opened.spec} cannot be packed into {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    mib = sum(shard["bytes"] for shard in shards) / 2**20
    print(
        f"packed {len(opened)} images of {opened.spec} into {len(shards)} files, {mib:,.1f} MiB; "
        f"read them as records:{out}"
    )
    if missing:
        print(f"{len(missing)} of them could not be read and are stored as empty records")
    return {"images": len(opened), "missing": len(missing), "shards": len(shards)}


def _write_shards(
    contents: Iterable[bytes], folder: Path, shard_bytes: int, bar: tqdm
) -> list[dict[str, Any]]:
    """Writes records into files of about `shard_bytes` each; returns one entry per file."""
    shards: list[dict[str, Any]] = []
    contents = iter(contents)
    for first in contents:
        path = folder / f"{len(shards):05}.array_record"
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        count = size = 0
        for content in itertools.chain([first], contents):
            writer.write(content)
            bar.update()
            count += 1
            size += len(content)
            if size >= shard_bytes:
                break
        writer.close()
        shards.append({"file": path.name, "records": count, "bytes": path.stat().st_size})
    return shards


def _write_index(source: EncodedSource, folder: Path) -> None:
    count = range(len(source))
    names = Names.of([os.fsencode(source.name(i)) for i in count])
    np.savez(
        folder / records.INDEX,
        labels=np.array([source.label(i) for i in count], np.int32),
        names=np.frombuffer(names.block, np.uint8),
        name_ends=names.ends,
    )


def _write_listing(source: EncodedSource, shards: list[dict[str, Any]], folder: Path) -> None:
    listing = {
        "format": records.FORMAT,
        "version": records.VERSION,
        "source": source.spec,
        "class_names": source.class_names,
        "shards": shards,
    }
    (folder / records.LISTING).write_text(json.dumps(listing, indent=1) + "\n")
