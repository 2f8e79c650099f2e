"""Ranking metrics, compared with recorded results and with values computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from dino_jax.evaluate.retrieval.ranking import KS, average_precision, rank, score_ranking
from tests.conftest import parity_cases


def lists(**indices: list[int]) -> dict[str, np.ndarray]:
    names = ("easy", "hard", "junk")
    return {name: np.array(indices.get(name, []), np.int64) for name in names}


@pytest.mark.parametrize("path", parity_cases("retrieval*.npz"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    truth = [lists(**entry) for entry in json.loads(str(golden["gnd"]))]
    kappas = golden["kappas"].tolist()
    for protocol in ("medium", "hard"):
        found = score_ranking(golden["ranks"], truth, protocol, kappas)
        np.testing.assert_allclose(
            found.average_precisions, golden[f"ap_{protocol}"], rtol=0, atol=1e-12
        )
        assert found.mean_average_precision == pytest.approx(float(golden[f"map_{protocol}"]))
        assert list(found.mean_precision) == kappas
        np.testing.assert_allclose(
            list(found.mean_precision.values()), golden[f"mpk_{protocol}"], rtol=1e-12
        )


@pytest.mark.parametrize(
    ("places", "number", "expected"),
    [
        ([0, 1, 2], 3, 1.0),
        ([1], 1, (0 + 1 / 2) / 2),
        ([0, 2], 2, (1 + 1 + 1 / 2 + 2 / 3) / 4),
        ([0], 2, 0.5),  # the second was not found
        ([], 4, 0.0),
    ],
)
def test_average_precision_by_hand(places: list[int], number: int, expected: float) -> None:
    assert average_precision(np.array(places, np.int64), number) == pytest.approx(expected)


def test_the_three_protocols_by_hand() -> None:
    """One query, ranked as hard 4, junk 2, easy 0, other 3, easy 1, hard 5."""
    ranks = np.array([[4], [2], [0], [3], [1], [5]])
    truth = [lists(easy=[0, 1], hard=[4, 5], junk=[2])]
    easy = score_ranking(ranks, truth, "easy")  # of 0, 3, 1: right at 0 and 2
    assert easy.mean_average_precision == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4)
    assert easy.mean_precision == pytest.approx({1: 1.0, 5: 2 / 3, 10: 2 / 3})
    medium = score_ranking(ranks, truth, "medium")  # of 4, 0, 3, 1, 5: right but at 2
    expected = (2 + 2 + 2 / 3 + 3 / 4 + 3 / 4 + 4 / 5) / 8
    assert medium.mean_average_precision == pytest.approx(expected)
    assert medium.mean_precision == pytest.approx({1: 1.0, 5: 4 / 5, 10: 4 / 5})
    hard = score_ranking(ranks, truth, "hard")  # of 4, 3, 5
    assert hard.mean_average_precision == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4)


def test_means_skip_queries_without_positives() -> None:
    ranks = np.array([[0, 1], [1, 0]])
    truth = [lists(easy=[1]), lists(hard=[1])]
    easy = score_ranking(ranks, truth, "easy")
    assert easy.mean_average_precision == pytest.approx(1 / 4)
    np.testing.assert_array_equal(np.isnan(easy.average_precisions), [False, True])
    nothing = score_ranking(ranks, [lists(), lists(junk=[0])], "medium")
    assert np.isnan(nothing.mean_average_precision)
    assert all(np.isnan(value) for value in nothing.mean_precision.values())
    assert tuple(nothing.mean_precision) == KS


def test_rank_by_cosine() -> None:
    database = np.array([[10, 1], [0, 0.1], [-1, 0], [0, 0]], np.float32)
    queries = np.array([[2, 0], [0, 5]], np.float32)
    np.testing.assert_array_equal(rank(database, queries).T, [[0, 1, 3, 2], [1, 0, 2, 3]])
