"""k-NN scores of the teacher during training."""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.config.spec import ModelSpec
from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.evaluate.classification.labelled import knn_of_sources, open_labelled
from dino_jax.evaluate.features.square_pass import EvalTransform, extract, feature_function
from dino_jax.models.network import abstract

PyTree = Any
Table = dict[int, dict[str, float]]


class OnlineKnn:
    """Computes k-NN scores on a config's sources, which are opened on construction.

    Args:
      config: a checked config.
      spec: the config's model.
      mesh: the devices.
      train_records: the records of `data.train`. If the k-NN training set is the same source, they
        are reused, so that each unreadable image is reported once.
    Raises:
      UsageError: a source cannot be opened or has no labels.
    """

    def __init__(
        self, config: ConfigDict, spec: ModelSpec, mesh: Mesh, train_records: Records
    ) -> None:
        self._config = config
        self._mesh = mesh
        self.sources = open_labelled(
            config.eval.knn_train or config.data.train, config.eval.knn_test
        )
        self._records = [
            train_records
            if source.spec == train_records.source.spec
            else Records(
                source,
                max_unreadable=config.data.max_unreadable,
                max_pixels=config.data.max_pixels,
                channels=len(config.crops.mean),
            )
            for source in self.sources
        ]
        for records in self._records:
            records.read_or_next(0, decode)  # raises if no image can be read
        self._transform = EvalTransform(
            spec.resize, spec.crop, spec.canvas_size, spec.mean, spec.std
        )
        graphdef, _, _ = abstract(spec.backbone)
        self._feature_fn = feature_function(graphdef, self._transform, mesh)

    def __call__(self, params: PyTree, batch_stats: PyTree) -> Table:
        """Scores a backbone.

        Args:
          params: parameters of backbone and head; the head is not used.
          batch_stats: running statistics of backbone and head.
        Returns: `{k: {"top1": percent, "top5": percent}}`.
        """
        backbone = params["backbone"], batch_stats.get("backbone", {})
        sides = [
            extract(
                lambda batch: self._feature_fn(*backbone, batch),
                records,
                self._transform,
                batch_size=self._config.eval.batch_size,
                num_threads=self._config.data.num_threads,
                mesh=self._mesh,
            )
            for records in self._records
        ]
        return knn_of_sources(
            *self.sources,
            *sides,
            ks=self._config.eval.knn_ks,
            temperature=self._config.eval.knn_temperature,
            mesh=self._mesh,
        )
