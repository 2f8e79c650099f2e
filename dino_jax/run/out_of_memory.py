"""Compares the memory that a run needs with its devices' memory, and suggests settings."""

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

    state: int  # for the training state
    limit: int | None  # available on the device; None if unknown
    step: int | None = None  # additional bytes during a step; None until it is compiled

    @classmethod
    def of(cls, shapes: TrainState, shardings: TrainState, mesh: Mesh) -> Self:
        """The memory that is known from shapes alone."""
        return cls(stored_bytes(shapes, shardings), device_limit(mesh))

    def with_step(self, compiled: jax.stages.Compiled) -> Self:
        """Adds the memory of the compiled step: batch, activations, gradients."""
        planned = planned_bytes(compiled)
        return dataclasses.replace(self, step=None if planned is None else planned - self.state)

    @property
    def total(self) -> int:
        """The memory of state and step, as far as known."""
        return self.state + (self.step or 0)

    @property
    def fits(self) -> bool:
        """False only if the need is known to exceed the limit."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        step = "" if self.step is None else f" and {gib(self.step)} during a step"
        limit = f", {gib(self.limit)} available" if self.limit else ""
        return f"per device {gib(self.state)} for the state{step}{limit}"


class MemoryGuard:
    """Turns out-of-memory errors into advice, as a context manager.

    Args:
      need: the memory that the run needs, as far as shapes determine it.
    Raises:
      UsageError: on entry or in `add_step` if the memory is known to be too small; on exit if JAX
        ran out of memory.
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
    """The memory that a run needs, and the settings that reduce it, in one line."""
    return (
        f"not enough device memory: {need}. Set --config.model.remat=dots or full, "
        "--config.optim.accumulation_steps=2 or more, --config.train.sharding=fsdp (several "
        "devices), or a smaller --config.train.batch_size (in a new workdir). Saved checkpoints "
        "are intact"
    )
