"""The device mesh, which has one axis, and how the arrays of a run are sharded over it.

`dp` replicates the whole state on every device. `fsdp` shards every large array over the devices:
each step gathers the weights, and each device updates its own slice (Rajbhandari et al., ZeRO,
arXiv 1910.02054). Both shard a batch over its first axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
Run = Callable[[tuple[PyTree, PyTree], PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]

AXIS = "data"
MODES = ("dp", "fsdp")
FSDP_MIN_SIZE = 4096  # elements; gathering smaller arrays costs more than it saves


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, by default all, with the single axis "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Shards the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def array_sharding(array: jax.ShapeDtypeStruct, mesh: Mesh, mode: str) -> NamedSharding:
    """The sharding of one array of the state.

    In fsdp mode the array is sharded over its largest axis that is divisible by the number of
    devices. In dp mode, and if it is small or has no such axis, it is replicated.
    """
    shardable = [i for i, n in enumerate(array.shape) if n % mesh.size == 0]
    if mode == "dp" or np.prod(array.shape) < FSDP_MIN_SIZE or not shardable:
        return replicated(mesh)
    axis = max(shardable, key=lambda i: array.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def state_shardings(abstract_state: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """The sharding of every array of a state, given their shapes."""
    return jax.tree.map(lambda array: array_sharding(array, mesh, mode), abstract_state)


def with_shardings(abstract_state: PyTree, shardings: PyTree) -> PyTree:
    """Adds shardings to abstract arrays, to compile a step or to restore a checkpoint."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
    )


@dataclasses.dataclass(frozen=True)
class PassLayout:
    """How devices share a forward and backward pass. Each device processes its own images."""

    mesh: Mesh
    params: PyTree  # the PartitionSpec of every parameter, the same for student and teacher


def pass_layout(param_shardings: PyTree, mesh: Mesh) -> PassLayout | None:
    """The layout of a pass, given the shardings of its parameters; None for a single device."""
    if mesh.size == 1:
        return None
    return PassLayout(mesh, jax.tree.map(lambda sharding: sharding.spec, param_shardings))


def spread_pass(run: Run, layout: PassLayout) -> Run:
    """Runs a pass on every device with its share of the batch, and averages the results.

    All communication of weights and gradients happens here. Sharded weights are gathered once.
    Gradients are averaged once, after all micro-batches of a step, and sharded like their
    parameters.

    Args:
      run: maps (weights, shared, batch) to (gradients, means, shared). `weights` is the pair of
        student and teacher weights; the gradients are the student's. Gradients and means are
        averages over the batch. `shared` is equal on all devices, both as input and as output.
      layout: the layout of the weights; the batch is sharded over its first axis.
    Returns: the same function for the whole batch.
    """
    weights = layout.params, layout.params

    def share(here: PyTree, shared: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        gradients, means, shared = run(jax.tree.map(_gather, here, weights), shared, batch)
        gradients = jax.tree.map(_mean_in_place, gradients, layout.params)
        return gradients, jax.lax.pmean(means, AXIS), shared

    everywhere = PartitionSpec()
    return jax.shard_map(
        share,
        mesh=layout.mesh,
        in_specs=(weights, everywhere, PartitionSpec(AXIS)),
        out_specs=(layout.params, everywhere, everywhere),
        check_vma=False,  # with it, gradients would be summed in every micro-batch
    )


def _gather(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Gathers the whole array from the parts on all devices."""
    if AXIS not in spec:
        return part
    return jax.lax.all_gather(part, AXIS, axis=spec.index(AXIS), tiled=True)


def _mean_in_place(whole: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The mean over the devices; if the array is sharded, this device's part of the mean."""
    if AXIS not in spec:
        return jax.lax.pmean(whole, AXIS)
    total = jax.lax.psum_scatter(whole, AXIS, scatter_dimension=spec.index(AXIS), tiled=True)
    return total / jax.lax.axis_size(AXIS)


def device_axes() -> tuple[str, ...]:
    """The mesh axes to reduce over for a sum over all images; empty outside `shard_map`."""
    return jax.sharding.get_abstract_mesh().manual_axes
