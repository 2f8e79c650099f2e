"""A loaded backbone, replicated on all devices: the starting point of every evaluation."""

import dataclasses
import json
import logging
from typing import Any, Literal

import jax

from dino_jax import sharding
from dino_jax.config.spec import DTYPES
from dino_jax.data.decode import MAX_PIXELS
from dino_jax.data.sources import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.cache import About, describe_data
from dino_jax.models.attention_kernel import choose_kernel
from dino_jax.models.network import split
from dino_jax.weights.load import load


@dataclasses.dataclass(frozen=True)
class PassOptions:
    """How a backbone processes images: the options that all jobs share.

    Raises:
      UsageError: a value is out of range.
    """

    which: Literal["teacher", "student"] = "teacher"  # Network of a run; the teacher is better.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Compute dtype of the backbone.
    batch_size: int = 64  # Images per batch, over all devices.
    num_threads: int = 8  # Threads that decode images.
    max_unreadable: float = 0.05  # Share of images that may be unreadable; they are skipped.
    max_pixels: int = MAX_PIXELS  # Images with more pixels are unreadable.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("which", "dtype", "max_unreadable") and (
                value is not None and value < 1
            ):
                raise UsageError(f"{field.name}={value} must be at least 1")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable={self.max_unreadable} must be between 0 and 1")
        if self.max_pixels > MAX_PIXELS:
            raise UsageError(
                f"max_pixels={self.max_pixels} must be at most {MAX_PIXELS}, Pillow's limit: "
                "shrink larger images"
            )


class PlacedBackbone:
    """A backbone and its weights on the devices.

    Attributes:
      model: the backbone, on one device.
      info: describes the weights.
      options: of the pass.
      mesh: all devices.
      graphdef: structure of the backbone.
      weights: (params, batch_stats), replicated on all devices.
    """

    def __init__(self, weights: str, options: PassOptions, which: str | None = None) -> None:
        """Loads the weights; computes nothing yet.

        Args:
          weights: as in `weights.load.load`.
          options: of the pass.
          which: overrides `options.which`, for example with "untrained".
        Raises:
          UsageError: the weights cannot be loaded, or contain no backbone.
        """
        which = options.which if which is None else which
        self.model, self.info = load(weights, which=which, dtype=options.dtype)
        self.options = options
        self.mesh = sharding.make_mesh()
        if self.model.family == "vit":
            self._choose_attention()
        self.graphdef, *trees = split(self.model)
        self.weights = jax.device_put(trees, sharding.replicated(self.mesh))

    def _choose_attention(self) -> None:
        """Uses cuDNN's attention kernel where it works at the size of the weights' own crop."""
        blocks, side = self.model.blocks, self.info.crop // self.info.patch_size
        kernel, note = choose_kernel(
            "auto",
            DTYPES[self.info.dtype],
            num_heads=self.info.num_heads,
            head_dim=self.info.embed_dim // self.info.num_heads,
            lengths=(1 + side**2,),
            platform=self.mesh.devices.flat[0].platform,
            devices=self.mesh.local_devices,
        )
        if note:
            logging.warning("%s", note)
        for block in blocks:
            block.attn.kernel = kernel

    def about(self, source: Source, feature: str, transform: dict[str, Any]) -> About:
        """Everything that determines the features of a source: their key in a cache.

        Args:
          source: the images.
          feature: name of the feature, with all its settings.
          transform: how the images are prepared; JSON values only.
        """
        about = {
            "weights": self.info.sha256,
            "feature": feature,
            "dtype": self.info.dtype,
            "transform": transform,
            "data": describe_data(source) | {"max_pixels": self.options.max_pixels},
        }
        return json.loads(json.dumps(about))  # as it is read back: tuples become lists
