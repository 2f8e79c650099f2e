"""What a run takes of the memory of each device, before it takes it."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

PyTree = Any
_CONTAINER_LIMITS = (  # of control groups, version 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def stored_bytes(arrays: PyTree, shardings: PyTree) -> int:
    """Bytes on each device of arrays, real or abstract, that are laid out like this."""
    return sum(
        math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize
        for array, where in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True)
    )


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on each device while a compiled function runs, as XLA planned; None if it cannot say.

    They are its arguments, its results without those that take an argument's place, and whatever
    it needs in between.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


def device_limit(mesh: Mesh) -> int | None:
    """Bytes that the smallest local device lends to JAX, a CPU's its part of the machine's memory.

    None where devices do not say.
    """
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return machine_memory() // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None)


def machine_memory() -> int:
    """Bytes of memory that this machine has, or lends to the container that this runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def gib(num_bytes: float) -> str:
    """Bytes as GiB, such as "1.50 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"


_SIGNS = ("resource_exhausted", "out of memory", "out_of_memory")  # in what JAX raises


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether JAX raised this because the memory of a device is exhausted."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error).lower() for sign in _SIGNS
    )
