"""What a run takes of the memory of each device, before it takes it."""

import dataclasses
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh

from dino_jax.training.state import TrainState

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


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run takes of each device."""

    state: int  # there between steps
    weights: int  # of this the student's parameters, as if they were not spread over devices
    limit: int | None  # what a device lends, where that is known
    step: int | None = None  # more within a step: batch, activations, gradients; once compiled

    @classmethod
    def of(cls, shapes: TrainState, shardings: TrainState, mesh: Mesh) -> Self:
        """What is known from shapes alone."""
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.params))
        return cls(stored_bytes(shapes, shardings), weights, device_limit(mesh))

    def with_step(self, compiled: jax.stages.Compiled) -> Self:
        """The same with what the compiled step adds."""
        planned = planned_bytes(compiled)
        return dataclasses.replace(self, step=None if planned is None else planned - self.state)

    @property
    def total(self) -> int:
        """As far as it is known."""
        return self.state + (self.step or 0)

    @property
    def fits(self) -> bool:
        """Whether nothing is known against it."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        step = "" if self.step is None else f" and {gib(self.step)} more in a step"
        limit = f", of {gib(self.limit)}" if self.limit else ""
        return f"per device {gib(self.state)} of state{step}{limit}"


def gib(num_bytes: float) -> str:
    """Bytes as GiB, such as "1.50 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"
