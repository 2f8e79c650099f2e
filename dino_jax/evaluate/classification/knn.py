"""Weighted k-nearest-neighbour classification of frozen features.

The protocol of Wu et al. 2018 (https://arxiv.org/abs/1805.01978, section 3.4) as the DINO paper
uses it: each of the k nearest training images by cosine similarity votes for its class, with
weight `exp(similarity / temperature)`.

Dims: N bank (training) images, Q query (test) images, q queries in a block, D feature width,
C classes in the bank, k neighbours.
"""

import logging
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dino_jax import sharding
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.neighbours import BankLayout, make_bank, nearest, query_blocks

KS = (10, 20, 100, 200)  # as in the paper; 20 is usually best
TOP = 5  # classes ranked per query: enough for top-1 and top-5


def knn_accuracy(
    train_features: np.ndarray | jax.Array,
    train_labels: np.ndarray,
    test_features: np.ndarray | jax.Array,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    memory_budget: int = 1 << 30,
    mesh: Mesh | None = None,
) -> dict[int, dict[str, float]]:
    """Accuracy of the vote of the nearest neighbours.

    Args:
      train_features: [N, D], the bank; any float dtype, not necessarily normalised.
      train_labels: [N] integers, not necessarily contiguous.
      test_features: [Q, D].
      test_labels: [Q]; a class that is not in the bank counts as wrong.
      ks: numbers of neighbours; all are scored in one pass. A number larger than N is reduced to
        N, with a warning.
      temperature: of the votes, 0.07 in the paper.
      memory_budget: bytes per device for one block of queries, besides the features.
      mesh: the devices that share the bank; default: all.
    Returns: `{k: {"top1": percent, "top5": percent}}`, ascending in k, with the k that was used.
      As in the reference, top5 considers `min(5, k, C)` classes; classes with no votes fill the
      remaining ranks.
    Raises: UsageError for shapes that do not match, an empty set, a value that is not finite, or a
      setting out of range.
    """
    test_labels = np.asarray(test_labels)
    _check_labels("test", test_features, test_labels)
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        ks=ks,
        temperature=temperature,
        memory_budget=memory_budget,
        mesh=mesh,
    )
    table = {}
    for k, classes in predictions.items():
        hits = classes == test_labels[:, None]
        table[k] = {
            "top1": 100 * float(hits[:, 0].mean()),
            "top5": 100 * float(hits.any(axis=1).mean()),
        }
    return table


def knn_predict(
    train_features: np.ndarray | jax.Array,
    train_labels: np.ndarray,
    test_features: np.ndarray | jax.Array,
    *,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    memory_budget: int = 1 << 30,
    mesh: Mesh | None = None,
) -> dict[int, np.ndarray]:
    """Ranks the classes of every query; arguments and errors as in `knn_accuracy`.

    Returns: `{k: [Q, min(5, k, C)]}` labels as in `train_labels`, most votes first.
    """
    train_labels = np.asarray(train_labels)
    _check_labels("train", train_features, train_labels)
    if test_features.ndim != 2 or test_features.shape[1] != train_features.shape[1]:
        raise UsageError(
            f"test features of shape {test_features.shape} do not match train features of shape "
            f"{train_features.shape}: both must be [images, width] from the same model"
        )
    features, queries = (np.asarray(x, np.float32) for x in (train_features, test_features))
    _check_finite("train", features)
    _check_finite("test", queries)
    check_votes(ks, temperature)
    ks = _usable_ks(ks, len(train_labels))

    mesh = sharding.make_mesh() if mesh is None else mesh
    classes, codes = np.unique(train_labels, return_inverse=True)
    codes = codes.astype(np.int32)
    bank = make_bank(features, k=ks[-1], mesh=mesh)
    bytes_per_query = bank.layout.bytes_per_query + 4 * (2 * len(classes) + 4 * ks[-1])
    ranked = []
    for block, count in query_blocks(queries, bytes_per_query, memory_budget):
        ranks = _rank_classes(
            block, bank.rows, codes, temperature, bank.layout, ks=ks, num_classes=len(classes)
        )
        ranked.append([np.asarray(r)[:count] for r in ranks])  # waits: one block in memory
    return {
        k: classes[np.concatenate(r)] for k, r in zip(ks, zip(*ranked, strict=True), strict=True)
    }


def check_votes(ks: Sequence[int], temperature: float) -> None:
    """Raises UsageError for settings out of range."""
    if not ks or min(ks) < 1:
        raise UsageError(f"ks={tuple(ks)} must be one or more numbers of at least 1, such as {KS}")
    if not temperature > 0:
        raise UsageError(f"temperature={temperature} must be above 0; the paper uses 0.07")


@partial(jax.jit, static_argnames=("layout", "ks", "num_classes"))
def _rank_classes(
    queries: jax.Array,
    bank: jax.Array,
    codes: jax.Array,
    temperature: float,
    layout: BankLayout,
    *,
    ks: tuple[int, ...],
    num_classes: int,
) -> list[jax.Array]:
    """Class codes by descending votes, [q, min(5, k, C)] for each of the ascending `ks`."""
    similarities, neighbours = nearest(queries, bank, layout)  # [q, k]
    neighbour_codes = codes[neighbours]
    # Relative to the nearest neighbour: same ranking, but no temperature can overflow.
    weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
    rows = jnp.arange(len(queries))[:, None]
    votes = jnp.zeros((len(queries), num_classes))
    ranked, counted = [], 0
    for k in ks:  # the neighbours of a smaller k are the first of a larger k
        votes = votes.at[rows, neighbour_codes[:, counted:k]].add(weights[:, counted:k])
        ranked.append(jax.lax.top_k(votes, min(TOP, k, num_classes))[1])
        counted = k
    return jax.lax.with_sharding_constraint(ranked, sharding.replicated(layout.mesh))


def _usable_ks(ks: Sequence[int], num_bank: int) -> tuple[int, ...]:
    """Ascending and unique; values larger than the bank are reduced to its size."""
    for k in ks:
        if k > num_bank:
            _warn_cut(k, num_bank)
    return tuple(sorted({min(k, num_bank) for k in ks}))


@cache  # warn once, not after every epoch
def _warn_cut(k: int, num_bank: int) -> None:
    logging.warning("k-NN: k=%d is larger than the bank of %d images: all vote", k, num_bank)


def _check_labels(name: str, features: np.ndarray | jax.Array, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UsageError(
            f"{name} labels of shape {labels.shape} do not match features of shape "
            f"{features.shape}: they must have the shapes [images] and [images, width]"
        )
    if len(labels) == 0:
        raise UsageError(f"k-NN got 0 {name} images: it needs at least one")


def _check_finite(name: str, features: np.ndarray) -> None:
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    if bad:
        raise UsageError(
            f"{bad} of {len(features)} {name} feature vectors contain a value that is not finite: "
            "the weights are broken, or the compute dtype overflows (try float32)"
        )
