"""Features of whole sources, for the jobs: a backbone, a cache and a progress bar."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.square_pass import (
    EvalTransform,
    FeatureFn,
    Features,
    feature_function,
    join,
    stream,
)
from dino_jax.evaluate.features.tokens import Feature


@dataclasses.dataclass(frozen=True)
class Extraction(PassOptions):
    """How features are computed: the options of all jobs that use one square crop per image."""

    batch_size: int = 256  # Images per batch, over all devices.
    # Pixels of the shorter side before the centre crop; default: from the weights.
    resize: int | None = None
    crop: int | None = None  # Pixels of the centre crop; default: from the weights.
    # Pixels; larger images are resized on the host, which is slower; default: from the weights.
    canvas_size: int | None = None


class Extractor(PlacedBackbone):
    """A backbone that computes the features of whole sources.

    Attributes:
      transform: how images are prepared.
      unreadable: number of unreadable images that were skipped, by source.
    """

    def __init__(self, weights: str, options: Extraction) -> None:
        """Loads the weights; computes nothing yet.

        Args:
          weights: as in `weights.load.load`.
          options: of the pass.
        Raises:
          UsageError: the weights cannot be loaded, or the crop is too large.
        """
        super().__init__(weights, options)
        self.transform = EvalTransform(
            resize=options.resize or self.info.resize,
            crop=options.crop or self.info.crop,
            canvas_size=options.canvas_size or self.info.canvas_size,
            mean=self.info.mean,
            std=self.info.std,
        )
        if self.transform.crop > min(self.transform.resize, self.transform.canvas_size):
            raise UsageError(
                f"crop={self.transform.crop} must not be larger than "
                f"resize={self.transform.resize} or canvas_size={self.transform.canvas_size}"
            )
        self.unreadable: dict[str, int] = {}
        self._compiled: dict[Feature, FeatureFn] = {}

    def feature_shape(self, feature: Feature) -> tuple[int, ...]:
        """The shape of one image's feature, such as (D,).

        Raises:
          UsageError: the backbone has no such feature.
        """
        side = self.transform.crop
        image = jax.ShapeDtypeStruct((1, side, side, len(self.info.mean)), np.float32)
        return jax.eval_shape(lambda x: feature(self.model, x), image).shape[1:]

    def settings(self, feature: Feature) -> dict[str, Any]:
        """The settings of the pass, for `results.json`."""
        chosen = {name: getattr(self.transform, name) for name in ("resize", "crop", "canvas_size")}
        return dataclasses.asdict(self.options) | chosen | {"feature": repr(feature)}

    def stream(self, feature: Feature, source: Source) -> Iterator[Features]:
        """Features of a source, batch by batch, with a progress bar; does not use the cache."""
        if feature not in self._compiled:
            self._compiled[feature] = feature_function(
                self.graphdef, self.transform, self.mesh, feature
            )
        feature_fn, options, read = self._compiled[feature], self.options, 0
        is_main = jax.process_index() == 0
        with tqdm(total=len(source), desc=source.spec, unit=" images", disable=not is_main) as bar:
            for part in stream(
                lambda batch: feature_fn(*self.weights, batch),
                Records(
                    source,
                    max_unreadable=options.max_unreadable,
                    max_pixels=options.max_pixels,
                    channels=len(self.info.mean),
                ),
                self.transform,
                batch_size=options.batch_size,
                num_threads=options.num_threads,
                mesh=self.mesh,
            ):
                bar.update(len(part.index))
                read += len(part.index)
                yield part
        self.unreadable[source.spec] = len(source) - read

    def features(
        self, feature: Feature, sources: Sequence[Source], cache: FeatureCache = FeatureCache()
    ) -> list[Features]:
        """Features of whole sources, from the cache or computed.

        Args:
          feature: which outputs of the backbone to use.
          sources: the images.
          cache: where features are stored.
        Raises:
          UsageError: the backbone has no such feature, or required features are not in the cache;
            before anything is computed.
        """
        self.feature_shape(feature)
        transform = dataclasses.asdict(self.transform)
        found = cache.features(
            sources,
            lambda source: self.about(source, repr(feature), transform),
            lambda source: join(self.stream(feature, source)),
        )
        for source, features in zip(sources, found, strict=True):
            self.unreadable[source.spec] = len(source) - len(features.index)
        return found
