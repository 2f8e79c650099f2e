"""Compares a run's memory with its devices', and names the settings to change."""

import dataclasses
from types import TracebackType
from typing import Self

import jax
from jax.sharding import Mesh

from dino_jax.errors import UsageError
from dino_jax.memory import device_limit, gib, is_out_of_memory, planned_bytes, stored_bytes
from dino_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run needs on each device."""

    state: int  # kept between steps
    limit: int | None  # of the device; None where unknown
    step: int | None = None  # additional within a step; known once it is compiled

    @classmethod
    def of(cls, shapes: TrainState, shardings: TrainState, mesh: Mesh) -> Self:
        """The part that follows from shapes alone."""
        return cls(stored_bytes(shapes, shardings), device_limit(mesh))

    def with_step(self, compiled: jax.stages.Compiled) -> Self:
        """Adds the memory of the compiled step: batch, activations, gradients."""
        planned = planned_bytes(compiled)
        return dataclasses.replace(self, step=None if planned is None else planned - self.state)

    @property
    def total(self) -> int:
        """State and step, as far as known."""
        return self.state + (self.step or 0)

    @property
    def fits(self) -> bool:
        """False only if the need is known to exceed the limit."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        step = "" if self.step is None else f" and {gib(self.step)} more in a step"
        limit = f", of {gib(self.limit)}" if self.limit else ""
        return f"per device {gib(self.state)} of state{step}{limit}"


class MemoryGuard:
    """Turns exhausted device memory into advice, as a context manager.

    Args:
      need: of the run, as far as shapes determine it.
    Raises:
      UsageError: on entering or in `add_step` if the memory is known to be too small; on leaving if
        JAX ran out of it.
    """

    def __init__(self, need: Need) -> None:
        self.need = need

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if is_out_of_memory(error):
            raise UsageError(advice(self.need)) from error

    def add_step(self, step: jax.stages.Compiled) -> None:
        """Adds the memory of the compiled step."""
        self.need = self.need.with_step(step)
        self._check()

    def _check(self) -> None:
        if not self.need.fits:
            raise UsageError(advice(self.need))


def advice(need: Need) -> str:
    """What the run needs, and the settings that change it, in one line."""
    return (
        f"not enough device memory: {need}. Set --config.model.remat=dots or full, "
        "--config.optim.accumulation_steps=2 or more, --config.train.sharding=fsdp (several "
        "devices), or a smaller --config.train.batch_size (in a new workdir). Checkpoints already "
        "saved are intact"
    )
