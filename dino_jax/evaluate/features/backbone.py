"""A loaded backbone on all devices: where every evaluation begins."""

import dataclasses
import json
from typing import Any, Literal

import jax

from dino_jax import sharding
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.cache import About, describe_data
from dino_jax.models.network import split
from dino_jax.weights.load import load


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a backbone goes over images: the options that all jobs share.

    Raises:
      UsageError: a number is out of its range.
    """

    which: Literal["teacher", "student"] = "teacher"  # Network of a run; the teacher is better.
    dtype: Literal["float32", "bfloat16"] = "float32"  # What the backbone computes in.
    batch_size: int = 64  # Images at a time over all devices.
    num_threads: int = 8  # Threads that decode images.
    max_unreadable: float = 0.05  # Share of images that may be unreadable; they are left out.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("which", "dtype", "max_unreadable") and (
                value is not None and value < 1
            ):
                raise UsageError(f"{field.name}={value} must be at least 1")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable={self.max_unreadable} must be a share from 0 to 1")


class PlacedBackbone:
    """A backbone and where it lies.

    Attributes:
      model: the backbone, on one device.
      info: of the weights.
      options: of the pass.
      mesh: all devices.
      graphdef: of the backbone.
      weights: (params, batch_stats) on all devices.
    """

    def __init__(self, weights: str, options: Pass) -> None:
        """Loads the weights; nothing is computed yet.

        Args:
          weights: as `weights.load.load` takes them.
          options: of the pass.
        Raises:
          UsageError: the weights cannot be loaded, or are no backbone's.
        """
        self.model, self.info = load(weights, which=options.which, dtype=options.dtype)
        if self.info.arch == "linear":
            raise UsageError(f"weights={weights} is a linear classifier: give a backbone")
        self.options = options
        self.mesh = sharding.make_mesh()
        self.graphdef, *trees = split(self.model)
        self.weights = jax.device_put(trees, sharding.replicated(self.mesh))

    def about(self, source: Source, feature: str, transform: dict[str, Any]) -> About:
        """All that decides the features of a source, for a cache.

        Args:
          source: of images.
          feature: what is taken of the backbone, in words that say all that matters.
          transform: how images are prepared, as JSON can say it.
        """
        about = {
            "weights": self.info.sha256,
            "feature": feature,
            "dtype": self.info.dtype,
            "transform": transform,
            "data": describe_data(source),
        }
        return json.loads(json.dumps(about))  # as it will be read: tuples are lists
