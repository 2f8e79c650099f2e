"""Passes over pictures of any shape: those that make one shape for the network share a batch.

Dims: B images, H and W sides of a canvas, C channels, N pictures of a source, D feature width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from dino_jax import sharding
from dino_jax.data.batches import counted, in_batches
from dino_jax.data.pipeline import Records
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PlacedBackbone
from dino_jax.evaluate.features.square_pass import Features, check_finite, join, one_ahead

PyTree = Any
Batch = dict[str, jax.Array]
# (backbone, canvas [B, H, W, C] uint8, sizes [B, 2] int32) -> [B, ...]
PictureFeature = Callable[[nnx.Module, jax.Array, jax.Array], jax.Array]
Load = Callable[[Image.Image], np.ndarray]  # an opened image -> [h, w, C] uint8

_CHUNK = 4  # large pictures that a thread reads in one go


class Group(NamedTuple):
    """Pictures that share batches."""

    indices: Sequence[int]  # in the source, ascending
    canvas: tuple[int, int]  # rows and columns; every picture fits


def in_place(features: Features, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features by the number of the picture.

    Args:
      features: of some of a source's pictures.
      count: N, pictures of the source.
    Returns: [N, D] float32, zeros where there are none, and [N] bool, True for the others.
    """
    rows = np.zeros((count, features.features.shape[1]), np.float32)
    rows[features.index] = features.features
    readable = np.zeros(count, bool)
    readable[features.index] = True
    return rows, readable


class PicturePass:
    """A backbone that goes over pictures; each feature function compiles once a shape."""

    def __init__(self, backbone: PlacedBackbone) -> None:
        self._backbone = backbone
        self._compiled: dict[PictureFeature, Callable[..., Batch]] = {}

    def check(self, feature: PictureFeature, canvas: tuple[int, int]) -> None:
        """Finds out in no time whether the backbone has such a feature; raises UsageError."""
        shape = (1, *canvas, len(self._backbone.info.mean))
        jax.eval_shape(
            lambda canvas, size: feature(self._backbone.model, canvas, size),
            jax.ShapeDtypeStruct(shape, np.uint8),
            jax.ShapeDtypeStruct((1, 2), np.int32),
        )

    def stream(
        self, feature: PictureFeature, records: Records, load: Load, group: Group
    ) -> Iterator[Batch]:
        """A feature of the pictures of a group, a batch at a time.

        Args:
          feature: what is computed; it prepares the images, too.
          records: the pictures.
          load: decodes one.
          group: which of them.
        Returns: iterator of `rows [B, ...]`, `index [B]` in the source and `valid [B]`, by
          ascending index; filling of index -1 comes last. Each is whole on every device and host,
          and the next one is under way.
        Raises:
          UsageError: more pictures are unreadable than may be, or a feature is not finite.
        """
        if feature not in self._compiled:
            self._compiled[feature] = self._compile(feature)
        compute = partial(self._compiled[feature], *self._backbone.weights)
        batches = self._batches(records, load, group)
        for batch in one_ahead(compute, batches, self._backbone.mesh):
            check_finite(*jax.device_get((batch.pop("finite"), batch["index"])), records.source)
            yield batch

    def features(
        self, records: Records, load: Load, groups: Mapping[PictureFeature, Group]
    ) -> Features:
        """Features of a source's pictures, with a progress bar.

        Args:
          records: the pictures.
          load: decodes one.
          groups: how each group's features are computed.
        Returns: a row for every picture that is readable and in a group, group by group.
        Raises:
          UsageError: more pictures are unreadable than may be, or all; or a feature is not finite.
        """
        parts = []
        total = sum(len(group.indices) for group in groups.values())
        with tqdm(
            total=total,
            desc=records.source.spec,
            unit=" images",
            disable=jax.process_index() > 0,
        ) as bar:
            for feature, group in groups.items():
                for batch in self.stream(feature, records, load, group):
                    found = jax.device_get(batch)
                    rows, index = (found[name][found["valid"]] for name in ("rows", "index"))
                    parts.append(Features(rows, np.full(len(index), -1, np.int32), index))
                    bar.update(int((found["index"] >= 0).sum()))
        if not any(len(part.index) for part in parts):
            raise UsageError(
                f"none of the {len(records)} images of {records.source.spec} is usable"
            )
        return join(parts)

    def _compile(self, feature: PictureFeature) -> Callable[..., Batch]:
        mesh, graphdef = self._backbone.mesh, self._backbone.graphdef

        def run(params: PyTree, batch_stats: PyTree, batch: Batch) -> Batch:
            params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
            model = nnx.merge(graphdef, params, batch_stats)
            # Weights that compute in float32 do so in full: accelerators would round operands.
            with jax.default_matmul_precision("highest"):
                rows = feature(model, batch["canvas"], batch["size"])
            index, valid = batch["index"], batch["valid"]
            finite = ~valid | jnp.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
            order = jnp.argsort(jnp.where(index < 0, jnp.iinfo(jnp.int32).max, index))
            found = {"rows": rows, "index": index, "valid": valid, "finite": finite}
            return {name: values[order] for name, values in found.items()}

        return jax.jit(run, out_shardings=sharding.replicated(mesh))

    def _batches(
        self, records: Records, load: Load, group: Group
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of `canvas`, `size`, `index` and `valid`; one shape for all."""
        count, devices = len(group.indices), self._backbone.mesh.size
        options, processes = self._backbone.options, jax.process_count()
        batch_size = math.ceil(min(options.batch_size, count) / devices) * devices
        blank = np.zeros((*group.canvas, records.channels), np.uint8)

        def read(place: int) -> dict[str, Any]:
            is_filling = place >= count
            pixels = None if is_filling else records.read(group.indices[place], load)
            return {
                "pixels": blank if pixels is None else pixels,
                "index": -1 if is_filling else group.indices[place],
                "valid": pixels is not None,
            }

        order = counted(math.ceil(count / batch_size) * batch_size)
        order = order[jax.process_index() :: processes]
        shape = *group.canvas, records.channels
        return in_batches(order, read, batch_size // processes, shape, options.num_threads, _CHUNK)
