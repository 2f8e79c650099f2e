"""The attention of a run's teacher to a few pictures, drawn when the run ends."""

import itertools
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.source import Source
from dino_jax.models.network import split
from dino_jax.models.spec import ModelSpec
from dino_jax.visualize.attention import THRESHOLD, attention_function, check_attends
from dino_jax.visualize.attention_sheet import Attended, pictures_sheet
from dino_jax.visualize.pictures import SIZE, Pictures, fit

PyTree = Any


class RunSheet:
    """Draws the first `log.attention_sheet` pictures of a config's test source.

    Args:
      config: checked.
      spec: the config's model.
      train_source: stands in where `eval.knn_test` is not set.
      mesh: the devices that hold the weights.
    Raises:
      UsageError: the test source cannot be opened, or the network has no attention.
    """

    def __init__(
        self, config: ConfigDict, spec: ModelSpec, train_source: Source, mesh: Mesh
    ) -> None:
        test = config.eval.knn_test
        source = open_source(test) if test else train_source
        self._number = config.log.attention_sheet
        self._pictures = Pictures([source], channels=len(spec.mean))
        model = nnx.eval_shape(lambda: spec.backbone(nnx.Rngs(0)))
        check_attends(model, f"log.attention_sheet={self._number}: {config.model.name}")
        self._patch_size = model.patch_size
        graphdef, _, _ = split(model)
        self._attention_fn = attention_function(graphdef, spec.mean, spec.std, mesh)

    def __call__(self, params: PyTree, batch_stats: PyTree, path: Path) -> None:
        """Writes the sheet, on the first process.

        Args:
          params: parameters of backbone and head; the head takes no part.
          batch_stats: running statistics likewise.
          path: of the PNG.
        """
        backbone = params["backbone"], batch_stats.get("backbone", {})
        attended = []
        for name, pixels in itertools.islice(self._pictures, self._number):
            image = fit(pixels, SIZE, self._patch_size)
            maps = jax.device_get(self._attention_fn(*backbone, image[None]))[0]
            attended.append(Attended(name, image, maps, self._patch_size, pixels.shape[:2]))
        if jax.process_index() == 0:
            title = f"attention of the class token in {path.resolve().parent.name}"
            pictures_sheet(attended, THRESHOLD, title).save(path)
