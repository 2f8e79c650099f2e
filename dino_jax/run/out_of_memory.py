"""Answers a device that is out of memory with the settings that would fit.

What a change saves is an estimate, rather too small than too large. The bytes of a step are taken
for a part that does not depend on the batch, a few times the weights, and for a part for each image
of a pass, which remat shrinks. benchmarks/README.md has the figures behind both.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.errors import UsageError
from dino_jax.memory import device_limit, gib, is_out_of_memory, planned_bytes, stored_bytes
from dino_jax.training.state import TrainState

# What the backward pass finds of each image, as shares of all activations. A ViT keeps 0.36 and
# 0.06, an XCiT 0.41 and 0.21; the rest is room for what is computed again.
ACTIVATIONS = {"none": 1.0, "dots": 0.5, "full": 0.3}
WEIGHTS = 3  # copies in a step: gradients, results, what fsdp gathers; 1.9 to 2.3 were measured
MARGIN = 1.05  # of an estimate
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes unless told otherwise
# That say otherwise; the second is the former name, and JAX refuses both together.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


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


class MemoryGuard:
    """While entered, what JAX raises of exhausted memory becomes advice on what would fit.

    Args:
      config: of the run.
      need: what the run takes, as far as shapes tell.
      num_devices: that share the batch.
    Raises:
      UsageError: on entering or in `plan`, where the device's memory is known not to do; on
        leaving, where it did not.
    """

    def __init__(self, config: ConfigDict, need: Need, num_devices: int) -> None:
        self._config, self.need, self._num_devices = config, need, num_devices

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
            raise UsageError(answer(self._config, self.need, self._num_devices)) from error

    def plan(self, step: jax.stages.Compiled) -> None:
        """Takes note of what the compiled step adds."""
        self.need = self.need.with_step(step)
        self._check()

    def _check(self) -> None:
        if not self.need.fits:
            raise UsageError(answer(self._config, self.need, self._num_devices))


def answer(config: ConfigDict, need: Need, num_devices: int) -> str:
    """What is needed, what there is, and the changes that would fit, in a sentence or two."""
    changes = list(remedies(config, need, num_devices))
    return (
        f"the memory of a device does not do: {need}. "
        + (f"Each of these would fit, by estimate: {'; '.join(changes)}" if changes else _NOTHING)
        + ". Checkpoints are as the last save left them"
    )


_NOTHING = (
    "No single change would fit: combine --config.model.remat=full, --config.train.sharding=fsdp "
    "(several devices), --config.train.batch_size and --config.head.out_dim, or take a smaller "
    "model.name or larger devices"
)


def remedies(config: ConfigDict, need: Need, num_devices: int) -> Iterator[str]:
    """The changes that would fit, each by itself: those that keep the result come first."""
    need = with_any_step(need)
    room = available(need)
    batch, accumulation = config.train.batch_size, config.optim.accumulation_steps

    def fitting(key: str, values: Iterable[Any]) -> Iterator[str]:
        for value in values:
            if MARGIN * predicted(config, need, num_devices, {key: value}) <= room:
                yield f"--config.{key}={value}"
                return

    policies = list(ACTIVATIONS)
    yield from fitting("model.remat", policies[policies.index(config.model.remat) + 1 :])
    if num_devices > 1:
        yield from fitting("train.sharding", {"dp": ["fsdp"]}.get(config.train.sharding, []))
    images = batch // num_devices
    yield from fitting(
        "optim.accumulation_steps",
        (n for n in range(accumulation + 1, images + 1) if images % n == 0),
    )
    multiple = num_devices * accumulation
    yield from (
        f"{change} (another run: in a new workdir)"
        for change in fitting("train.batch_size", range(batch - multiple, 0, -multiple))
    )
    can_lend_more = jax.default_backend() == "gpu" and not any(map(os.environ.get, FRACTIONS))
    if can_lend_more and room < need.total <= (need.limit or 0) * 0.95 / GPU_SHARE:
        yield f"the environment variable {FRACTIONS[0]}=0.95"


def with_any_step(need: Need) -> Need:
    """The need with some bytes for a step that has not been compiled: twice what is left for it.

    What a step takes is not known then, only that half of it may do.
    """
    if need.step is not None:
        return need
    left = 50 * need.state if need.limit is None else max(need.limit - need.state, 0)
    return dataclasses.replace(need, step=2 * left)


def available(need: Need) -> int:
    """Bytes that a change has to do with: the limit, or half a step where the run was within it."""
    return need.state + need.step // 2 if need.fits else need.limit


def predicted(config: ConfigDict, need: Need, num_devices: int, changes: dict[str, Any]) -> float:
    """About the bytes that the run would take of each device with other settings.

    Args:
      config: the settings that `need` was found for.
      need: of those.
      num_devices: that share the batch.
      changes: {key: value} of model.remat, train.sharding, train.batch_size and
        optim.accumulation_steps.
    """
    now = {
        "model.remat": config.model.remat,
        "train.sharding": config.train.sharding,
        "train.batch_size": config.train.batch_size,
        "optim.accumulation_steps": config.optim.accumulation_steps,
    }
    then = now | changes

    whatever_the_batch = WEIGHTS * need.weights

    def images(settings: dict[str, Any]) -> float:
        passes = settings["optim.accumulation_steps"] * num_devices
        return settings["train.batch_size"] / passes * ACTIVATIONS[settings["model.remat"]]

    by_images = max(need.step - whatever_the_batch, 0) * images(then) / images(now)
    spread = num_devices if (now["train.sharding"], then["train.sharding"]) == ("dp", "fsdp") else 1
    return need.state / spread + whatever_the_batch + by_images
