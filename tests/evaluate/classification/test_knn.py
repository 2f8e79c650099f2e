"""k-NN, compared with recorded results of the reference and with a NumPy formula."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax import sharding
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification import knn
from dino_jax.evaluate.classification.knn import knn_accuracy, knn_predict
from dino_jax.evaluate.classification.neighbours import make_bank
from tests.conftest import parity_cases


def plain_ranking(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temperature: float = 0.07
) -> np.ndarray:
    """The formula in float64, one query at a time."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    classes = np.unique(labels)
    ranking = []
    for query in test.astype(np.float64):
        similarities = train @ query
        nearest = np.argsort(-similarities, kind="stable")[:k]
        votes = [np.exp(similarities[i] / temperature) * (labels[i] == classes) for i in nearest]
        order = np.argsort(-np.sum(votes, axis=0), kind="stable")
        ranking.append(classes[order[: min(5, k)]])
    return np.array(ranking)


def clusters(
    images: int, queries: int, classes: int, width: int = 16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Noisy class means: (train, train labels, test, test labels); neighbours often disagree."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((classes, width))
    labels, test_labels = rng.integers(classes, size=images), rng.integers(classes, size=queries)
    train = means[labels] + 1.5 * rng.standard_normal((images, width))
    test = means[test_labels] + 1.5 * rng.standard_normal((queries, width))
    return train.astype(np.float32), labels, test.astype(np.float32), test_labels


@pytest.mark.parametrize("path", parity_cases("knn*.npz"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    table = knn_accuracy(
        golden["train_features"],
        golden["train_labels"],
        golden["query_features"],
        golden["query_labels"],
        ks=meta["ks"],
        temperature=meta["temperature"],
    )
    assert list(table) == sorted(meta["ks"])
    for k, row in table.items():
        # Percentages: a single different prediction would change them by 0.3.
        np.testing.assert_allclose((row["top1"], row["top5"]), meta["accuracy"][str(k)], atol=1e-3)


@pytest.mark.parametrize(
    ("images", "queries", "classes"),
    [(400, 90, 30), (50, 20, 5), (40, 7, 3), (9, 3, 2), (5, 1, 1)],
)
def test_equals_the_plain_formula(images: int, queries: int, classes: int) -> None:
    train, labels, test, test_labels = clusters(images, queries, classes)
    ks = [k for k in (1, 3, 5, 20, 200) if k <= images]
    predictions = knn_predict(train, labels, test, ks=ks)
    table = knn_accuracy(train, labels, test, test_labels, ks=ks)
    for k in ks:
        expected = plain_ranking(train, labels, test, k)
        np.testing.assert_array_equal(predictions[k], expected)
        hits = expected == test_labels[:, None]
        assert table[k] == pytest.approx(
            {"top1": 100 * hits[:, 0].mean(), "top5": 100 * hits.any(axis=1).mean()}
        )


def test_votes_are_weighted_by_similarity() -> None:
    """One near neighbour outweighs two far ones at a low temperature, but not at a high one."""
    train = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    labels = np.array([7, 3, 3])
    query = np.array([[5, 0]], np.float32)
    assert knn_predict(train, labels, query, ks=[3], temperature=0.07)[3].tolist() == [[7, 3]]
    assert knn_predict(train, labels, query, ks=[3], temperature=1.0)[3].tolist() == [[3, 7]]
    # exp(1 / 0.001) overflows float32; the ranking must survive it.
    assert knn_predict(train, labels, query, ks=[3], temperature=1e-3)[3].tolist() == [[7, 3]]


@pytest.mark.parametrize("budget", [1, 50_000, 300_000])
def test_result_does_not_depend_on_the_memory_budget(budget: int) -> None:
    train, labels, test, _ = clusters(images=300, queries=101, classes=8)
    whole = knn_predict(train, labels, test)
    blocks = knn_predict(train, labels, test, memory_budget=budget)
    for k in whole:
        np.testing.assert_array_equal(blocks[k], whole[k])


def compiled_block(
    train: np.ndarray, block: np.ndarray, *, ks: tuple[int, ...], num_classes: int
) -> jax.stages.Compiled:
    bank = make_bank(train, k=ks[-1], mesh=sharding.make_mesh())
    codes = np.zeros(len(train), np.int32)
    arguments = (block, bank.rows, codes, 0.07, bank.layout)
    return knn._rank_classes.lower(*arguments, ks=ks, num_classes=num_classes).compile()


@pytest.mark.parametrize(
    ("budget", "queries", "blocks"),
    [(1_000_000, 20, [5] * 4), (16_000_000, 700, [100] * 7), (1 << 30, 700, [700])],
)
@pytest.mark.compiler
def test_blocks_are_even_and_within_the_budget(
    budget: int, queries: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query needs 157 kB on each device, so the budgets fit 6, 101 and more than all queries."""
    train, labels, test, _ = clusters(images=72_000, queries=queries, classes=8, width=4)
    seen, rank_classes = [], knn._rank_classes

    def record(part: np.ndarray, *args: Any, **static: Any) -> list[jax.Array]:
        seen.append(len(part))
        return rank_classes(part, *args, **static)

    with monkeypatch.context() as patch:
        patch.setattr(knn, "_rank_classes", record)
        knn_predict(train, labels, test, ks=[200], memory_budget=budget)
    assert seen == blocks
    compiled = compiled_block(train, test[: blocks[0]], ks=(200,), num_classes=8)
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert 4 * 9_000 * blocks[0] <= needed <= budget


def test_labels_can_have_gaps_and_unseen_classes() -> None:
    train, labels, test, test_labels = clusters(images=200, queries=60, classes=6)
    names = np.array([-4, 3, 17, 1000, 70_000, 2**40])
    plain = knn_accuracy(train, labels, test, test_labels)
    assert knn_accuracy(train, names[labels], test, names[test_labels]) == plain
    unseen = np.where(test_labels == 2, 18, names[test_labels])
    hits = knn_predict(train, names[labels], test)[20][:, 0] == names[test_labels]
    expected = 100 * (hits & (test_labels != 2)).mean()
    assert knn_accuracy(train, names[labels], test, unseen)[20]["top1"] == pytest.approx(expected)
    assert expected < plain[20]["top1"]


def test_bank_of_one_and_too_large_k(caplog: pytest.LogCaptureFixture) -> None:
    knn._warn_cut.cache_clear()
    one = np.ones((1, 3), np.float32)
    test = np.array([[1, 2, 3], [-1, -2, -3]], np.float32)
    with caplog.at_level(logging.WARNING):
        table = knn_accuracy(one, np.array([4]), test, np.array([4, 5]))
        knn_accuracy(one, np.array([4]), test, np.array([4, 5]))
    assert table == {1: {"top1": 50.0, "top5": 50.0}}
    assert [record.args for record in caplog.records] == [(k, 1) for k in (10, 20, 100, 200)]


def test_too_large_k_uses_the_whole_bank() -> None:
    train, labels, test, test_labels = clusters(images=30, queries=20, classes=4)
    cut = knn_accuracy(train, labels, test, test_labels, ks=(100, 10, 200))
    assert list(cut) == [10, 30]
    assert cut == knn_accuracy(train, labels, test, test_labels, ks=(10, 30))


def test_zero_vectors_are_equally_similar_to_all() -> None:
    train = np.array([[0, 0], [0, 3], [0, 1], [2, 0]], np.float32)
    labels = np.array([5, 6, 6, 8])
    queries = np.array([[0, 0], [1, 0]], np.float32)
    predictions = knn_predict(train, labels, queries, ks=[1, 4])
    assert predictions[4][:, 0].tolist() == [6, 8]  # two votes of four, then the nearest one
    assert predictions[1].tolist() == [[5], [8]]


def test_scale_and_array_type_do_not_matter() -> None:
    train, labels, test, test_labels = clusters(images=150, queries=40, classes=5)
    expected = knn_accuracy(train, labels, test, test_labels)
    scaled = train * np.linspace(0.01, 100, len(train), dtype=np.float32)[:, None]
    assert knn_accuracy(jnp.asarray(scaled), labels, jnp.asarray(test), test_labels) == expected
    assert knn_accuracy(scaled.astype(np.float64), labels, test, test_labels) == expected
    half = jnp.asarray(train, jnp.bfloat16)
    rounded = np.asarray(half, np.float32)
    assert knn_accuracy(half, labels, test, test_labels) == knn_accuracy(
        rounded, labels, test, test_labels
    )


@pytest.mark.compiler
def test_compiled_block_has_no_full_sort_and_no_one_hot_votes() -> None:
    train = np.ones((20_000, 4), np.float32)
    compiled = compiled_block(train, train[:8], ks=(10, 200), num_classes=10_000)
    # A full sort takes 15 times as long as top-k. Only the selected groups may be sorted.
    sorted_shapes = re.findall(r"= (\S+) sort\(", compiled.as_text())
    assert [shape.partition("{")[0] for shape in sorted_shapes] == ["s32[8,200]"]
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 8 * 10_000


def test_rejects_empty_queries() -> None:
    train, labels, test, _ = clusters(images=20, queries=1, classes=2)
    with pytest.raises(UsageError, match="got 0 test images: it needs at least one"):
        knn_predict(train, labels, test[:0])


@pytest.mark.parametrize("device", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("side", ["train", "test"])
def test_non_finite_features_are_counted(side: str, device: Callable) -> None:
    train, labels, test, test_labels = clusters(images=20, queries=10, classes=2)
    bad = {"train": train, "test": test}[side]
    bad[3, 0], bad[3, 1], bad[7, 5] = np.nan, np.inf, -np.inf
    with pytest.raises(UsageError, match=f"2 of {len(bad)} {side} feature vectors"):
        knn_accuracy(device(train), labels, device(test), test_labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_features": np.ones((10, 15))}, r"\(10, 15\).*\(20, 16\)"),
        ({"test_features": np.ones(10)}, r"\(10,\)"),
        ({"train_labels": np.zeros(19, int)}, r"train labels of shape \(19,\).*\(20, 16\)"),
        ({"test_labels": np.zeros((10, 1), int)}, r"test labels of shape \(10, 1\)"),
        ({"test_features": np.ones((0, 16)), "test_labels": np.zeros(0)}, "0 test images"),
        ({"train_features": np.ones((0, 16)), "train_labels": np.zeros(0)}, "0 train images"),
        ({"ks": ()}, r"ks=\(\)"),
        ({"ks": (20, 0)}, r"ks=\(20, 0\)"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_rejects_arguments(change: dict[str, Any], message: str) -> None:
    train, labels, test, test_labels = clusters(images=20, queries=10, classes=2)
    arguments = {
        "train_features": train,
        "train_labels": labels,
        "test_features": test,
        "test_labels": test_labels,
    }
    with pytest.raises(UsageError, match=message):
        knn_accuracy(**(arguments | change))
