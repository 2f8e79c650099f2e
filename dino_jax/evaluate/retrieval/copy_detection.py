"""Copy detection: the descriptor of a picture, and the score of a subset.

The protocol of the paper's section 4.2.1 on Copydays (Douze et al. 2009).

Dims: B images, H and W pixels, C channels, N pictures of the database, Q queries, D width of the
backbone, E width of the descriptor.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dino_jax.data.transforms import color
from dino_jax.evaluate.features.tokens import intermediate_layers
from dino_jax.evaluate.retrieval.copydays import ORIGINAL, Copydays
from dino_jax.evaluate.retrieval.ranking import average_precision, rank

RESULTS = 20  # first results of a query that count
GEM_POWER = 4.0


@dataclasses.dataclass(frozen=True)
class CopyDescriptor:
    """The class token, concatenated with the generalised mean of the patch tokens.

    Attributes:
      mean: C values on the scale 0..1.
      std: C values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, model: nnx.Module, canvas: jax.Array, _: jax.Array) -> jax.Array:
        """[B, H, W, C] uint8 -> [B, 2 * D]."""
        images = color.normalize(jnp.moveaxis(canvas, -1, -3), self.mean, self.std)
        tokens = intermediate_layers(model, images, 1)[0]
        return jnp.concatenate([tokens[:, 0], generalized_mean(tokens[:, 1:])], axis=1)


def generalized_mean(tokens: jax.Array, power: float = GEM_POWER) -> jax.Array:
    """GeM pooling (Radenović et al. 2017): [B, N, D] -> [B, D]; negative values count as 0.

    Args:
      tokens: patch tokens.
      power: 1 gives the mean, infinity the maximum.
    """
    positive = jnp.maximum(tokens, 1e-6)
    return (positive**power).mean(axis=1) ** (1 / power)


def copy_precisions(
    queries: np.ndarray,
    query_pictures: np.ndarray,
    database: np.ndarray,
    database_pictures: np.ndarray,
    results: int = RESULTS,
) -> np.ndarray:
    """The average precision of each query, over the first results only.

    Args:
      queries: [Q, E] descriptors.
      query_pictures: [Q] the picture that each was made from.
      database: [N, E] descriptors of originals and distractors.
      database_pictures: [N] likewise; contains the picture of every query.
      results: number of first results that count.
    Returns: [Q] from 0 to 1.
    """
    ranked = database_pictures[rank(database, queries)[:results]]  # [results, Q]
    return np.array(
        [
            average_precision(np.flatnonzero(column == of), np.sum(database_pictures == of))
            for column, of in zip(ranked.T, query_pictures, strict=True)
        ]
    )


def score_subsets(
    copydays: Copydays, rows: np.ndarray, readable: np.ndarray, distractors: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
    """Scores every subset of Copydays against the originals.

    Args:
      copydays: the data set.
      rows: [len(copydays.files), E] descriptors.
      readable: [len(copydays.files)] bool; unreadable originals, and their copies, are skipped.
      distractors: [n, E] descriptors to add to the originals.
    Returns: for each subset "map" in percent, None without queries, and the number of "queries".
    """
    originals = np.arange(len(rows))[copydays.subsets[ORIGINAL]]
    originals = originals[readable[originals]]
    database = np.concatenate([rows[originals], distractors])
    pictures = np.concatenate([copydays.pictures[originals], np.full(len(distractors), "")])
    usable = readable & np.isin(copydays.pictures, copydays.pictures[originals])
    scores = {}
    for name, part in copydays.subsets.items():
        of, kept = copydays.pictures[part], usable[part]
        precisions = copy_precisions(rows[part][kept], of[kept], database, pictures)
        mean = 100 * float(precisions.mean()) if len(precisions) else None
        scores[name] = {"map": mean, "queries": len(precisions)}
    return scores
