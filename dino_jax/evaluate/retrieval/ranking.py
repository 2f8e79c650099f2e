"""Ranks a database for queries, and scores the rankings.

The measures of the revisited Oxford and Paris benchmarks (Radenović et al. 2018,
https://arxiv.org/abs/1803.11285, section 3): images are easy, hard or junk for a query; the three
protocols differ in which of them are positives and which are ignored.

Dims: N images of the database, Q queries, D feature width.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

KS = (1, 5, 10)  # for the mean precision at k
PROTOCOLS = {  # name: (positives, ignored)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclasses.dataclass(frozen=True)
class RetrievalScore:
    """The scores of one protocol, from 0 to 1; queries without positives are skipped."""

    mean_average_precision: float
    mean_precision: dict[int, float]  # by k
    average_precisions: np.ndarray  # [Q], NaN without positives


def _normalized(features: np.ndarray) -> np.ndarray:
    """Scales rows to length 1, [N, D] float32; zero rows stay zero."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def rank(database: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Ranks a database by cosine similarity.

    Args:
      database: [N, D].
      queries: [Q, D].
    Returns: [N, Q] rows of the database, most similar first.
    """
    return np.argsort(-(_normalized(database) @ _normalized(queries).T), axis=0, kind="stable")


def average_precision(places: np.ndarray, number: int) -> float:
    """Area under the precision-recall curve, by the trapezoidal rule, as for INRIA Holidays.

    Args:
      places: [n] ascending ranks, from 0, of the positives that were found.
      number: of positives in the database, at least 1.
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
      ranks: [N, Q], from `rank`.
      truth: for each query the "easy", "hard" and "junk" images.
      protocol: a key of `PROTOCOLS`.
      ks: for the mean precision; the precision at k stops at the last positive.
    """
    wanted, ignored = PROTOCOLS[protocol]
    precisions = np.full((len(truth), len(ks)), np.nan)
    average_precisions = np.full(len(truth), np.nan)
    for i, lists in enumerate(truth):
        place = np.empty(len(ranks), np.int64)  # rank of each image for this query
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
