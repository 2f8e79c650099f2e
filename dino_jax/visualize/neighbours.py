"""The nearest training images of some queries, as a picture.

Dims: Q queries, k neighbours.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dino_jax import sharding
from dino_jax.data.decode import decode
from dino_jax.data.sources.opening import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.neighbours import neighbours
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.jobs.results import check_writable
from dino_jax.visualize.sheet import TILE, Tile, contact_sheet, tile_of

QUERIES, NEIGHBOURS = 10, 10  # rows of a report, and neighbours in each
RIGHT, WRONG = (40, 170, 90), (220, 60, 60)  # frames of neighbours of the query's class or another
SIDE = TILE * 5 // 8


def check_picture(path: Path) -> None:
    """Raises UsageError where a picture of this name cannot be written."""
    try:  # some formats are for reading alone, others for pictures without colours
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(
            f"report={path} must be named as a picture that can be written: end it in .png or .jpg"
        ) from error
    check_writable(path, "report")


def write_report(path: Path, sources: tuple[Source, Source], sides: Sequence[Features]) -> None:
    """Draws some test images with their nearest training images.

    Args:
      path: of the picture.
      sources: bank and queries.
      sides: their features.
    """
    (bank, queries), (bank_side, query_side) = sources, sides
    # The same queries for all weights, so that reports can be compared; ordered by class.
    count = len(query_side.index)
    chosen = np.random.default_rng(0).permutation(count)[:QUERIES]
    chosen = chosen[np.argsort(query_side.labels[chosen], kind="stable")]
    similarities, rows = neighbours(
        bank_side.features,
        query_side.features[chosen],
        k=min(NEIGHBOURS, len(bank_side.index)),
        mesh=sharding.make_mesh(jax.local_devices()),  # one host draws, without the others
    )
    found = bank_side.index[rows]
    neighbours_sheet(queries, bank, query_side.index[chosen], found, similarities).save(path)


def neighbours_sheet(
    queries: Source,
    bank: Source,
    query_index: np.ndarray,
    neighbour_index: np.ndarray,
    similarities: np.ndarray,
) -> Image.Image:
    """A row for each query: itself, then its neighbours, framed green where the classes agree.

    Args:
      queries: the test source, labelled.
      bank: the training source, labelled.
      query_index: [Q], in `queries`.
      neighbour_index: [Q, k], in `bank`.
      similarities: [Q, k].
    """
    rows = []
    for query, nearest, near in zip(query_index, neighbour_index, similarities, strict=True):
        asked = _class_name(queries, query)
        row = [Tile(_tile(queries, query), asked)]
        for index, similarity in zip(nearest, near, strict=True):
            found = _class_name(bank, index)
            frame = RIGHT if found == asked else WRONG
            row.append(Tile(_tile(bank, index), f"{similarity:.3f}  {found}", frame))
        rows.append(row)
    return contact_sheet(rows, title=f"queries of {queries.spec}, and their nearest in {bank.spec}")


def _tile(source: Source, index: int) -> Image.Image:
    pixels = decode(source.image(int(index)), max_side=4 * SIDE)
    return tile_of(pixels, pixels.shape[:2], side=SIDE, smooth=True)


def _class_name(source: Source, index: int) -> str:
    label = source.label(int(index))
    return source.class_names[label] if source.class_names else str(label)
