"""Rankings of a database for queries, and how good they are.

The measures of the revisited Oxford and Paris benchmarks (Radenović et al. 2018,
https://arxiv.org/abs/1803.11285, section 3): images are easy, hard or junk for a query, and the
three protocols differ in which of them are to be found and which are taken out of the ranking.

Dims: N images of the database, Q queries, D feature width.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

KS = (1, 5, 10)  # of the mean precision at k
PROTOCOLS = {  # name: (what is to be found, what is taken out)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclasses.dataclass(frozen=True)
class RetrievalScore:
    """One protocol's measures, from 0 to 1; a query with nothing to find counts in none."""

    mean_average_precision: float
    mean_precision: dict[int, float]  # by k
    average_precisions: np.ndarray  # [Q], NaN where there is nothing to find


def _normalized(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, [N, D] float32; a row of zeros stays one."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def rank(database: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Ranks the database by cosine similarity.

    Args:
      database: [N, D].
      queries: [Q, D].
    Returns: [N, Q] rows of the database, the most similar first.
    """
    return np.argsort(-(_normalized(database) @ _normalized(queries).T), axis=0, kind="stable")


def average_precision(places: np.ndarray, number: int) -> float:
    """Area under precision over recall, by trapezoids, as the evaluation of Holidays has it.

    Args:
      places: [n] ascending places in the ranking, from 0, of the right images that were found.
      number: of right images in the database, at least 1.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / (2 * number))


def score_ranking(
    ranks: np.ndarray,
    truth: Sequence[Mapping[str, np.ndarray]],
    protocol: str,
    ks: Sequence[int] = KS,
) -> RetrievalScore:
    """Scores a ranking under one protocol.

    Args:
      ranks: [N, Q], as `rank` gives it.
      truth: for each query the images that are "easy", "hard" and "junk".
      protocol: a key of `PROTOCOLS`.
      ks: of the mean precision. Precision at k looks no further than the last right image.
    """
    wanted, ignored = PROTOCOLS[protocol]
    precisions = np.full((len(truth), len(ks)), np.nan)
    average_precisions = np.full(len(truth), np.nan)
    for i, lists in enumerate(truth):
        place = np.empty(len(ranks), np.int64)  # of each image in this query's ranking
        place[ranks[:, i]] = np.arange(len(ranks))
        right = np.sort(place[np.concatenate([lists[name] for name in wanted])])
        taken_out = np.sort(place[np.concatenate([lists[name] for name in ignored])])
        if len(right) == 0:
            continue
        right -= np.searchsorted(taken_out, right)
        average_precisions[i] = average_precision(right, len(right))
        for j, k in enumerate(ks):
            depth = min(k, right[-1] + 1)
            precisions[i, j] = (right < depth).sum() / depth
    scored = ~np.isnan(average_precisions)
    mean = precisions[scored].mean(axis=0) if scored.any() else np.full(len(ks), np.nan)
    return RetrievalScore(
        float(average_precisions[scored].mean()) if scored.any() else float("nan"),
        dict(zip(ks, mean.tolist(), strict=True)),
        average_precisions,
    )
