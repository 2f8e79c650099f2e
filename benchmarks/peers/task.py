"""The input of all sides of a comparison, so that they do the same work."""

import dataclasses
from typing import Any, Protocol

import numpy as np

CHECKED_STEPS = 3
SMALL_BATCH = 8  # of the exact steps, if the timed ones are not exact


@dataclasses.dataclass
class Task:
    """What every side gets; arrays are NumPy's."""

    sizes: dict[str, Any]  # and settings of model, views, loss and clipping
    weights: dict[str, np.ndarray]  # names and layouts as in `peers.torch_model`
    schedules: dict[str, np.ndarray]  # name: value of each step
    batch_size: int
    dtype: str  # of the timed steps
    exact: bool  # the timed steps are in float32 at full matmul precision

    def views(self, *, exact: bool) -> tuple[np.ndarray, ...]:
        """Noise in place of crops: [B, 2, H, W, C], and [B, L, h, w, C] if L > 0."""
        batch = min(self.batch_size, SMALL_BATCH) if exact and not self.exact else self.batch_size
        random, s = np.random.default_rng(1), self.sizes
        groups = ((2, s["global_size"]), (s["local_number"], s["local_size"]))
        shapes = [(batch, n, side, side, s["in_channels"]) for n, side in groups if n]
        return tuple(random.standard_normal(shape, np.float32) for shape in shapes)


class Side(Protocol):
    """One implementation of the step, in its own process."""

    def losses(self, task: Task, *, exact: bool) -> list[float]:
        """Losses of the first steps. Keeps the step to be timed.

        Args:
          task: shared by all sides.
          exact: compute in float32 at full matmul precision, else as timed.
        """
        ...

    def seconds(self, steps: int) -> float:
        """Seconds per step, averaged over a group of steps."""
        ...

    def peak_gib(self) -> float | None:
        """Peak memory on the device so far; None if the device does not count it."""
        ...

    def about(self) -> dict[str, Any]:
        """How this side computes."""
        ...
