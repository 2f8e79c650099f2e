"""Devices as one mesh axis, and where the arrays of a run lie on it.

`dp` keeps the whole state on every device. `fsdp` spreads every large array over the devices; a
step gathers the weights, and each device updates its own slice (Rajbhandari et al., ZeRO,
arXiv 1910.02054). Batches are spread over their first axis in both.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

AXIS = "data"
MODES = ("dp", "fsdp")
FSDP_MIN_SIZE = 4096  # elements; a gather of less costs more than the memory it saves


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices, or those given, on the one axis "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def array_sharding(array: jax.ShapeDtypeStruct, mesh: Mesh, mode: str) -> NamedSharding:
    """One array of the state: under fsdp its largest axis that the devices divide is spread."""
    shardable = [i for i, n in enumerate(array.shape) if n % mesh.size == 0]
    if mode == "dp" or np.prod(array.shape) < FSDP_MIN_SIZE or not shardable:
        return replicated(mesh)
    axis = max(shardable, key=lambda i: array.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def state_shardings(abstract_state: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """A sharding for every array of a state, from the shapes alone."""
    return jax.tree.map(lambda array: array_sharding(array, mesh, mode), abstract_state)


def with_shardings(abstract_state: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that say where their arrays lie, as compilation and restoring want them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
    )


@dataclasses.dataclass(frozen=True)
class PassLayout:
    """Where the arrays of a forward and backward pass lie; None leaves it to XLA."""

    weights: NamedSharding | None = None  # of student and teacher
    gradients: PyTree | None = None


def pass_layout(param_shardings: PyTree, mesh: Mesh) -> PassLayout:
    """Weights are gathered before a pass, and gradients end where the parameters are stored."""
    return PassLayout(
        weights=replicated(mesh),
        gradients=param_shardings,
    )


def constrain(tree: PyTree, where: PyTree | None) -> PyTree:
    """The tree, its arrays laid out as `where` says."""
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)
