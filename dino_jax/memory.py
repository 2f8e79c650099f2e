"""The device memory that a compiled function needs, and how much is available."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

PyTree = Any
_CONTAINER_LIMITS = (  # cgroup versions 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def stored_bytes(arrays: PyTree, shardings: PyTree) -> int:
    """Bytes per device of arrays, real or abstract, with these shardings."""
    return sum(
        math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize
        for array, where in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True)
    )


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes per device that a compiled function needs according to XLA; None if unknown.

    The sum of arguments, results and temporaries; a result that reuses the memory of a donated
    argument counts once.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


def device_limit(mesh: Mesh) -> int | None:
    """Bytes that JAX may use on the local device with the least memory; None if unknown.

    CPU devices share the machine's memory equally.
    """
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return machine_memory() // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None)


def machine_memory() -> int:
    """This machine's memory in bytes, or the limit of the container that this process runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def gib(num_bytes: float) -> str:
    """Formats a number of bytes as in "1.50 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"


_SIGNS = ("resource_exhausted", "out of memory", "out_of_memory")  # in JAX's error messages


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a JAX error caused by insufficient device memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error).lower() for sign in _SIGNS
    )
