"""What the sides of a comparison are given, so that they do the same work."""

import dataclasses
from typing import Any, Protocol

import numpy as np

CHECKED_STEPS = 3
SMALL_BATCH = 8  # of the exact steps, where the timed ones are not exact


@dataclasses.dataclass
class Task:
    """What every side is given; arrays are NumPy's."""

    sizes: dict[str, Any]  # of model, views, loss and clipping
    weights: dict[str, np.ndarray]  # by the names and in the layouts of `peers.torch_model`
    schedules: dict[str, np.ndarray]  # values by step
    batch_size: int
    dtype: str  # of the timed arithmetic
    exact: bool  # whether that is float32 at full precision

    def views(self, *, exact: bool) -> tuple[np.ndarray, ...]:
        """Noise in place of crops: [B, 2, H, W, C], and [B, L, h, w, C] if there are locals."""
        batch = min(self.batch_size, SMALL_BATCH) if exact and not self.exact else self.batch_size
        random, s = np.random.default_rng(1), self.sizes
        groups = ((2, s["global_size"]), (s["local_number"], s["local_size"]))
        shapes = [(batch, n, side, side, s["in_channels"]) for n, side in groups if n]
        return tuple(random.standard_normal(shape, np.float32) for shape in shapes)


class Side(Protocol):
    """One implementation of the step; it lives in a process of its own."""

    def losses(self, task: Task, *, exact: bool) -> list[float]:
        """Of the first steps; what was compiled for them stays to be timed.

        Args:
          exact: in float32 at full matmul precision, else in the timed arithmetic.
        """
        ...

    def seconds(self, steps: int) -> float:
        """Of one step, in a group of so many."""
        ...

    def peak_gib(self) -> float | None:
        """The most memory in use on the device so far; None where nobody counts."""
        ...

    def about(self) -> dict[str, Any]:
        """Dtype and versions."""
        ...
