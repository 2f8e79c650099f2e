"""The nearest rows of a bank, compared with a full sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax import sharding
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification import neighbours as module
from dino_jax.evaluate.classification.neighbours import BankLayout, make_bank, nearest, neighbours


def bank_and_queries(size: int, queries: int = 13, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Rows of norm 2, so that similarities are exact and many are equal."""
    rng = np.random.default_rng(size)
    draw = rng.choice([-1.0, 1.0], (size + queries, width)).astype(np.float32)
    return draw[:size], draw[size:]


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize(("size", "k"), [(4000, 7), (2000, 20), (500, 100), (11, 11), (9, 1)])
def test_equals_a_stable_sort(size: int, k: int, devices: int) -> None:
    bank, queries = bank_and_queries(size)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    similarities, found = neighbours(bank, queries, k=k, mesh=mesh, memory_budget=200_000)
    exact = queries @ bank.T / 4
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, order)  # ties too
    np.testing.assert_allclose(similarities, np.take_along_axis(exact, order, axis=1), atol=1e-6)


def test_lengths_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(3, 8)), rng.normal(size=(50, 8)) * rng.uniform(1, 9, (50, 1))
    bank[7] = 0  # a zero vector has similarity 0 with all rows
    similarities, rows = neighbours(bank, queries, k=4)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    cosines = queries @ bank.T / np.maximum(lengths, 1e-12)
    np.testing.assert_array_equal(rows, np.argsort(-cosines, axis=1)[:, :4])
    np.testing.assert_allclose(similarities, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)


def test_rejects_empty_queries() -> None:
    with pytest.raises(UsageError, match="got 0 test images: it needs at least one"):
        neighbours(np.ones((5, 3)), np.ones((0, 3)), k=2)


@pytest.mark.parametrize("group", [2, 8, 64])
def test_group_maxima_contain_the_largest(group: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, (5, 640)).astype(np.float32)
    values[:, 600:] = -np.inf
    found, places = module._largest(jnp.asarray(values), 9, group)
    order = np.argsort(-values, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(found, np.take_along_axis(values, order, axis=1))


def test_large_bank_is_grouped_and_sharded() -> None:
    bank = make_bank(np.ones((12_801, 2), np.float32), k=100, mesh=sharding.make_mesh())
    assert bank.layout.group == 4
    assert bank.layout.rows_per_device == 1604
    assert {shard.data.shape for shard in bank.rows.addressable_shards} == {(1604, 2)}
    np.testing.assert_allclose(np.linalg.norm(bank.rows[:12_801], axis=1), 1, atol=1e-6)


@pytest.mark.compiler
def test_matmul_is_full_precision() -> None:
    layout = BankLayout(size=8, k=1, group=1, mesh=sharding.make_mesh())
    lowered = jax.jit(nearest, static_argnums=2).lower(jnp.ones((2, 4)), jnp.ones((8, 4)), layout)
    assert "precision = [HIGHEST, HIGHEST]" in lowered.as_text()
