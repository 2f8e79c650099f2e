"""Devices as one mesh axis, and where the arrays of a run lie on it.

`dp` keeps the whole state on every device. `fsdp` spreads every large array over the devices; a
step gathers the weights, and each device updates its own slice (Rajbhandari et al., ZeRO,
arXiv 1910.02054). Batches are spread over their first axis in both.
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
    """How the devices share a forward and backward pass: each takes its own images."""

    mesh: Mesh
    params: PyTree  # a PartitionSpec for every parameter of the student, and so of the teacher


def pass_layout(param_shardings: PyTree, mesh: Mesh) -> PassLayout | None:
    """The layout of a pass over parameters that are stored so; None for one device."""
    if mesh.size == 1:
        return None
    return PassLayout(mesh, jax.tree.map(lambda sharding: sharding.spec, param_shardings))


def spread_pass(run: Run, layout: PassLayout) -> Run:
    """Lets every device run a pass over its share of the batch, and averages what comes out.

    What moves of weights and gradients is written here: weights that are stored in parts are
    gathered once, and gradients are added up once, after all passes of a step; each ends where its
    parameter is stored.

    Args:
      run: (weights, shared, batch) -> (gradients, means, shared), of some images. Weights
        are the student's and the teacher's, gradients the student's; gradients and means are means
        over these images, and what is shared is equal on all devices, before and after.
      layout: of the weights; the batch is spread over its first axis.
    """
    weights = layout.params, layout.params

    def share(here: PyTree, shared: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        gradients, means, shared = run(jax.tree.map(_gather, here, weights), shared, batch)
        gradients = jax.tree.map(_mean_in_place, gradients, layout.params)
        return gradients, jax.lax.pmean(means, AXIS), shared

    nowhere = PartitionSpec()
    return jax.shard_map(
        share,
        mesh=layout.mesh,
        in_specs=(weights, nowhere, PartitionSpec(AXIS)),
        out_specs=(layout.params, nowhere, nowhere),
        check_vma=False,  # gradients must not be added up before the passes are over
    )


def _gather(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole of an array, of which this device stores a part."""
    if AXIS not in spec:
        return part
    return jax.lax.all_gather(part, AXIS, axis=spec.index(AXIS), tiled=True)


def _mean_in_place(whole: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The mean over the devices, or the part of it that this device stores."""
    if AXIS not in spec:
        return jax.lax.pmean(whole, AXIS)
    total = jax.lax.psum_scatter(whole, AXIS, scatter_dimension=spec.index(AXIS), tiled=True)
    return total / jax.lax.axis_size(AXIS)


def device_axes() -> tuple[str, ...]:
    """The axes that a sum over all images goes over, where each device runs on its own share."""
    return jax.sharding.get_abstract_mesh().manual_axes
