"""Draws the teacher's attention maps for a few pictures when a run ends."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.config.spec import ModelSpec
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.compiled import compile_backbone
from dino_jax.evaluate.features.picture_features import AttentionMaps, check_attention
from dino_jax.models.network import split
from dino_jax.visualize.attention_masks import THRESHOLD
from dino_jax.visualize.attention_sheet import Attended, pictures_sheet
from dino_jax.visualize.pictures import SIZE, file_stem, fit_to_patches, read_pixels

PyTree = Any


class RunSheet:
    """Draws attention maps for the first readable pictures of a config's test source.

    Args:
      config: a checked config; `log.attention_sheet` is the number of pictures.
      spec: the config's model.
      train_source: the source to draw from if `eval.knn_test` is not set.
      mesh: the devices that the weights are on.
    Raises:
      UsageError: the test source cannot be opened, or the network has no attention.
    """

    def __init__(
        self, config: ConfigDict, spec: ModelSpec, train_source: Source, mesh: Mesh
    ) -> None:
        test = config.eval.knn_test
        source = open_source(test) if test else train_source
        self._number = config.log.attention_sheet
        # Any number of unreadable images is skipped.
        self._records = Records(source, max_unreadable=1.0, channels=len(spec.mean))
        model = nnx.eval_shape(lambda: spec.backbone(nnx.Rngs(0)))
        check_attention(model, f"log.attention_sheet={self._number}: {config.model.name}")
        self._patch_size = model.patch_size
        graphdef, _, _ = split(model)
        maps = AttentionMaps(spec.mean, spec.std)
        self._attention_fn = compile_backbone(maps, graphdef, mesh)

    def __call__(self, params: PyTree, batch_stats: PyTree, path: Path) -> None:
        """Draws the sheet; the first process writes it.

        Args:
          params: parameters of backbone and head; the head is not used.
          batch_stats: running statistics of backbone and head.
          path: the PNG file to write.
        """
        backbone = params["backbone"], batch_stats.get("backbone", {})
        attended: list[Attended] = []
        for index in range(len(self._records)):
            if len(attended) == self._number:
                break
            if (pixels := read_pixels(self._records, index)) is None:
                continue
            name = file_stem(self._records.source, index)
            image = fit_to_patches(pixels, SIZE, self._patch_size)
            maps = jax.device_get(self._attention_fn(*backbone, image[None], None))[0]
            attended.append(Attended(name, image, maps, self._patch_size, pixels.shape[:2]))
        if not attended:
            spec = self._records.source.spec
            raise UsageError(f"no image of {spec} can be read: see the warnings above")
        if jax.process_index() == 0:
            title = f"attention of the class token in {path.resolve().parent.name}"
            pictures_sheet(attended, THRESHOLD, title).save(path)
