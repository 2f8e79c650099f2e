"""Draws test images with their nearest training images.

Dims: Q queries, k neighbours.
"""

import numpy as np
from PIL import Image

from dino_jax.data.decode import decode
from dino_jax.data.sources import Source
from dino_jax.visualize.sheet import TILE, Tile, contact_sheet, tile_of

RIGHT, WRONG = (40, 170, 90), (220, 60, 60)  # frames of neighbours of the same and of other classes
SIDE = TILE * 5 // 8


def neighbours_sheet(
    queries: Source,
    bank: Source,
    query_index: np.ndarray,
    neighbour_index: np.ndarray,
    similarities: np.ndarray,
) -> Image.Image:
    """Draws a row per query: the query and its neighbours, framed green if the classes agree.

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
    return contact_sheet(
        rows, title=f"queries of {queries.spec} and their nearest neighbours in {bank.spec}"
    )


def _tile(source: Source, index: int) -> Image.Image:
    pixels = decode(source.image(int(index)), max_side=4 * SIDE)
    return tile_of(pixels, pixels.shape[:2], side=SIDE, smooth=True)


def _class_name(source: Source, index: int) -> str:
    label = source.label(int(index))
    return source.class_names[label] if source.class_names else str(label)
