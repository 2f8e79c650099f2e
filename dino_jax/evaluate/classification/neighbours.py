"""Exact nearest neighbours in a large bank, which is sharded over the devices; queries in blocks.

Every device finds the k nearest rows of its shard; the k nearest of those are the result. On GPUs,
XLA's top_k sorts whole rows, so it never gets long ones: the k largest values of a row are in the k
groups with the largest maxima, and only these groups are searched.

Dims: N bank rows, n of them on a device, Q queries, q queries in a block, D width, k neighbours,
g rows in a group.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dino_jax import sharding
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.tokens import unit_rows


@dataclasses.dataclass(frozen=True)
class BankLayout:
    """How a bank is sharded and searched; static under `jax.jit`."""

    size: int  # N, without padding
    k: int  # at most N
    group: int  # g
    mesh: Mesh

    @property
    def rows_per_device(self) -> int:
        """n, a multiple of g."""
        return _ceil(self.size, self.mesh.size * self.group) * self.group

    @property
    def bytes_per_query(self) -> int:
        """Memory of `nearest` on a device, besides the queries and the bank."""
        groups = self.rows_per_device // self.group
        candidates = min(self.k, groups) * self.group + self.mesh.size * self.k
        # Similarities before and after masking the padding; values and indices of top_k, each
        # twice where it sorts.
        return 4 * (2 * self.rows_per_device + 4 * groups + 5 * candidates)


class Bank(NamedTuple):
    """Unit vectors to search."""

    rows: jax.Array  # [n * devices, D] float32
    layout: BankLayout


def make_bank(features: np.ndarray, *, k: int, mesh: Mesh) -> Bank:
    """Shards features over the devices.

    Args:
      features: [N, D] float32, the same on every host, not necessarily normalised.
      k: number of neighbours, at most N.
      mesh: the devices.
    """
    # Minimises the number of values to search: N / g maxima and k * g candidates.
    group = 1 << round(np.log2(max(1, len(features) / mesh.size / k)) / 2)
    layout = BankLayout(len(features), k, group, mesh)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        here = features[index]
        return np.pad(here, ((0, layout.rows_per_device - len(here)), (0, 0)))

    shape = layout.rows_per_device * mesh.size, features.shape[1]
    rows = jax.make_array_from_callback(shape, sharding.batch_sharded(mesh), part)
    return Bank(unit_rows(rows), layout)


def nearest(queries: jax.Array, rows: jax.Array, layout: BankLayout) -> tuple[jax.Array, jax.Array]:
    """Cosine similarities and bank rows of the k nearest, nearest first, both [q, k].

    Ties are broken by the order in the bank, on any number of devices.

    Args:
      queries: [q, D] float32, not necessarily normalised.
      rows: of the bank.
      layout: of the bank.
    """

    def on_a_device(queries: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarities = jnp.einsum("qd,nd->qn", queries, rows, precision=jax.lax.Precision.HIGHEST)
        numbers = jax.lax.axis_index(sharding.AXIS) * len(rows) + jnp.arange(len(rows))
        similarities = jnp.where(numbers < layout.size, similarities, -jnp.inf)
        values, places = _largest(similarities, min(layout.k, len(rows)), layout.group)
        gather = partial(jax.lax.all_gather, axis_name=sharding.AXIS, axis=1, tiled=True)
        values, found = gather(values), gather(numbers[places])  # [q, devices * k]
        values, places = _top_k(values, layout.k)
        return values, jnp.take_along_axis(found, places, axis=1)

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_a_device,
        mesh=layout.mesh,
        in_specs=(everywhere, PartitionSpec(sharding.AXIS)),
        out_specs=everywhere,
        check_vma=False,  # it cannot infer that the gathered values are the same on all devices
    )(unit_rows(queries), rows)


def neighbours(
    train_features: np.ndarray,
    test_features: np.ndarray,
    *,
    k: int,
    memory_budget: int = 1 << 30,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The training images nearest to each test image by cosine similarity.

    Args:
      train_features: [N, D], finite, not necessarily normalised.
      test_features: [Q, D].
      k: number of neighbours, at most N.
      memory_budget: bytes per device for a block of queries, besides the features.
      mesh: the devices; default: all.
    Returns: similarities [Q, k] float32 and rows of `train_features` [Q, k] int32, nearest first.
    Raises:
      UsageError: there are no test images.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    bank = make_bank(np.asarray(train_features, np.float32), k=k, mesh=mesh)
    queries = np.asarray(test_features, np.float32)
    search = jax.jit(nearest, static_argnames="layout", out_shardings=sharding.replicated(mesh))
    found = []
    for block, count in query_blocks(queries, bank.layout.bytes_per_query, memory_budget):
        similarities, rows = search(block, bank.rows, layout=bank.layout)
        found.append((np.asarray(similarities)[:count], np.asarray(rows)[:count]))
    similarities, rows = map(np.concatenate, zip(*found, strict=True))
    return similarities, rows


def query_blocks(
    queries: np.ndarray, bytes_per_query: int, budget: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Splits queries into blocks of one shape that fit the budget.

    Args:
      queries: [Q, D].
      bytes_per_query: memory of a query.
      budget: bytes; a block has at least one query.
    Returns: iterator of (block [q, D], number of queries in it); the other rows are zeros.
    Raises:
      UsageError: there are no queries.
    """
    if not len(queries):
        raise UsageError("k-NN got 0 test images: it needs at least one")
    blocks = _ceil(len(queries), max(1, budget // bytes_per_query))
    size = _ceil(len(queries), blocks)
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        yield np.pad(part, ((0, size - len(part)), (0, 0))), len(part)


def _largest(values: jax.Array, k: int, group: int) -> tuple[jax.Array, jax.Array]:
    """`top_k` of [q, n], computed from the groups."""
    groups = values.reshape(len(values), -1, group)  # [q, n / g, g]
    if group == 1 or groups.shape[1] <= k:
        return _top_k(values, k)
    _, chosen = _top_k(groups.max(axis=2), k)
    chosen = jnp.sort(chosen, axis=1)  # so that equal values keep their order
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)  # [q, k, g]
    values, places = _top_k(candidates.reshape(len(values), -1), k)
    chosen = jnp.take_along_axis(chosen, places // group, axis=1)
    return values, chosen * group + places % group


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # Without a barrier, later slices are fused into top_k, and the CPU compiler sorts whole rows.
    # One barrier per output, as XLA's partitioner cannot separate a joint one from its top_k.
    largest, places = jax.lax.top_k(values, k)
    return jax.lax.optimization_barrier(largest), jax.lax.optimization_barrier(places)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
