"""k-NN scores of the teacher while it trains."""

import logging
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import EvalTransform, extract, feature_function
from dino_jax.evaluate.knn import knn_accuracy
from dino_jax.models.network import abstract
from dino_jax.settings import build_backbone

PyTree = Any
Table = dict[int, dict[str, float]]


def open_labelled(spec: str) -> Source:
    """Opens a source that must have labels.

    Raises:
      UsageError: it has none, or cannot be opened.
    """
    source = open_source(spec)
    if source.labels is None:
        raise UsageError(f"{spec} has no labels, which k-NN needs: put images in class folders")
    return source


class OnlineKnn:
    """Scores backbones of one architecture on the sources of a config; opens them at once.

    Raises:
      UsageError: a source cannot be opened or has no labels.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._sources = [
            open_labelled(spec)
            for spec in (config.eval.knn_train or config.data.train, config.eval.knn_test)
        ]
        self._transform = EvalTransform(
            resize=config.eval.resize,
            crop=config.eval.crop,
            canvas_size=config.eval.canvas_size,
            mean=config.crops.mean,
            std=config.crops.std,
        )
        graphdef, _, _ = abstract(lambda rngs: build_backbone(config, rngs))
        self._feature_fn = feature_function(graphdef, self._transform, mesh)

    def __call__(self, params: PyTree, batch_stats: PyTree) -> Table:
        """The k-NN table of a backbone.

        Args:
          params: parameters of backbone and head; the head takes no part.
          batch_stats: running statistics likewise.
        Returns: `{k: {"top1": percent, "top5": percent}}`.
        """
        backbone = params["backbone"], batch_stats.get("backbone", {})
        sides = []
        for source in self._sources:
            features, indices = extract(
                lambda batch: self._feature_fn(*backbone, batch),
                source,
                self._transform,
                batch_size=self._config.eval.batch_size,
                num_threads=self._config.data.num_threads,
                mesh=self._mesh,
            )
            if len(indices) < len(source):
                logging.warning(
                    "%d images of %s cannot be read", len(source) - len(indices), source.spec
                )
            sides += [features, source.labels[indices]]
        return knn_accuracy(
            *sides, ks=self._config.eval.knn_ks, temperature=self._config.eval.knn_temperature
        )
