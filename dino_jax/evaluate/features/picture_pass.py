"""A backbone over whole pictures of any shape: pictures that fit one canvas share batches.

Dims: B images, H and W sides of a canvas, C channels, N pictures of a source, D feature width.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from dino_jax.data.batches import counted, in_batches
from dino_jax.data.pipeline import Records
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PlacedBackbone
from dino_jax.evaluate.features.compiled import compile_backbone
from dino_jax.evaluate.features.square_pass import Features, check_finite, join, one_ahead

Batch = dict[str, jax.Array]
HostBatch = dict[str, np.ndarray]
# (backbone, canvas [B, H, W, C] uint8, sizes [B, 2] int32) -> [B, ...]
PictureFeature = Callable[[nnx.Module, jax.Array, jax.Array], jax.Array]
Load = Callable[[Image.Image], np.ndarray]  # an opened image -> [h, w, C] uint8

_CHUNK = 4  # large pictures that a thread reads at once


class Group(NamedTuple):
    """Pictures that share batches."""

    indices: Sequence[int]  # in the source, ascending
    canvas: tuple[int, int]  # rows and columns; every picture fits
    batch_size: int | None = None  # default: the options' batch size


def picture_sizes(records: Records, num_threads: int) -> dict[int, tuple[int, int]]:
    """Height and width of every readable picture, by index; reads the file headers only."""

    def size_of(image: Image.Image) -> tuple[int, int]:
        with image:
            return image.height, image.width

    with ThreadPoolExecutor(num_threads) as threads:
        sizes = threads.map(lambda i: records.read(i, size_of), range(len(records)))
        return {i: size for i, size in enumerate(sizes) if size is not None}


def in_place(features: Features, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scatters features to the positions of their pictures.

    Args:
      features: of some pictures of a source.
      count: N, pictures in the source.
    Returns: features [N, D] float32, zeros where there is none, and [N] bool, True where there is
      one.
    """
    rows = np.zeros((count, features.features.shape[1]), np.float32)
    rows[features.index] = features.features
    readable = np.zeros(count, bool)
    readable[features.index] = True
    return rows, readable


class PicturePass:
    """Runs a backbone over pictures; compiles once per feature function and canvas."""

    def __init__(self, backbone: PlacedBackbone) -> None:
        self._backbone = backbone
        self._compiled: dict[PictureFeature, Callable[..., Batch]] = {}

    def check(self, feature: PictureFeature, canvas: tuple[int, int]) -> None:
        """Raises UsageError if the backbone has no such feature; computes nothing."""
        shape = (1, *canvas, len(self._backbone.info.mean))
        jax.eval_shape(
            lambda canvas, size: feature(self._backbone.model, canvas, size),
            jax.ShapeDtypeStruct(shape, np.uint8),
            jax.ShapeDtypeStruct((1, 2), np.int32),
        )

    def stream(
        self, feature: PictureFeature, records: Records, load: Load, group: Group
    ) -> Iterator[Batch]:
        """Computes a feature of the pictures of a group, batch by batch.

        Args:
          feature: maps canvases to rows, including the preparation of the images.
          records: the pictures.
          load: decodes a picture.
          group: the pictures to process.
        Returns: iterator of `rows [B, ...]`, `index [B]` in the source and `valid [B]`, by
          ascending index; padding has index -1 and comes last. Batches are replicated, and the
          next one is already being computed.
        Raises:
          UsageError: too many pictures are unreadable, or a feature is not finite.
        """
        batches = self._batches(records, load, group)
        return self._run(feature, batches, records.source.name)

    def stream_frames(
        self, feature: PictureFeature, frames: Iterable[np.ndarray], batch_size: int
    ) -> Iterator[np.ndarray]:
        """Computes a feature of the frames of a video, one row after the other.

        Args:
          feature: as in `stream`.
          frames: [H, W, C] uint8, all of one shape, at least one; the same on every host.
          batch_size: frames per batch, over all devices; rounded up to a multiple of their number.
        Raises:
          UsageError: a feature is not finite.
        """
        batches = _frame_batches(frames, self._whole_batch(batch_size))
        for batch in self._run(feature, batches, lambda i: f"frame {i}"):
            found = jax.device_get(batch)
            yield from found["rows"][found["valid"]]

    def parts(
        self, records: Records, load: Load, groups: Iterable[tuple[PictureFeature, Group]]
    ) -> Iterator[Features]:
        """Features of the readable pictures of all groups, batch by batch, with a progress bar.

        Args:
          records: the pictures.
          load: decodes a picture.
          groups: pictures, and the feature to compute of them.
        Raises:
          UsageError: too many pictures are unreadable, or all; or a feature is not finite.
        """
        groups, read = list(groups), 0
        with tqdm(
            total=sum(len(group.indices) for _, group in groups),
            desc=records.source.spec,
            unit=" images",
            disable=jax.process_index() > 0,
        ) as bar:
            for feature, group in groups:
                for batch in self.stream(feature, records, load, group):
                    found = jax.device_get(batch)
                    rows, index = (found[name][found["valid"]] for name in ("rows", "index"))
                    yield Features(rows, np.full(len(index), -1, np.int32), index)
                    read += len(index)
                    bar.update(int((found["index"] >= 0).sum()))
        if not read:
            raise UsageError(
                f"none of the {len(records)} images of {records.source.spec} can be read: see the "
                "warnings above"
            )

    def features(
        self, records: Records, load: Load, groups: Iterable[tuple[PictureFeature, Group]]
    ) -> Features:
        """The rows of all `parts`, group by group."""
        return join(self.parts(records, load, groups))

    def _run(
        self,
        feature: PictureFeature,
        batches: Iterator[HostBatch],
        name: Callable[[int], str],
    ) -> Iterator[Batch]:
        backbone = self._backbone
        if feature not in self._compiled:
            run = partial(_sorted_rows, feature)
            self._compiled[feature] = compile_backbone(run, backbone.graphdef, backbone.mesh)
        compute = partial(self._compiled[feature], *backbone.weights)
        for batch in one_ahead(compute, batches, backbone.mesh):
            check_finite(*jax.device_get((batch.pop("finite"), batch["index"])), name)
            yield batch

    def _whole_batch(self, size: int) -> int:
        devices = self._backbone.mesh.size
        return math.ceil(size / devices) * devices

    def _batches(self, records: Records, load: Load, group: Group) -> Iterator[HostBatch]:
        """This process's share of `canvas`, `size`, `index` and `valid`; all of one shape."""
        count = len(group.indices)
        options, processes = self._backbone.options, jax.process_count()
        batch_size = self._whole_batch(min(group.batch_size or options.batch_size, count))
        blank = np.zeros((*group.canvas, records.channels), np.uint8)

        def read(place: int) -> dict[str, Any]:
            is_padding = place >= count
            pixels = None if is_padding else records.read(group.indices[place], load)
            return {
                "pixels": blank if pixels is None else pixels,
                "index": -1 if is_padding else group.indices[place],
                "valid": pixels is not None,
            }

        order = counted(math.ceil(count / batch_size) * batch_size)
        order = order[jax.process_index() :: processes]
        shape = *group.canvas, records.channels
        return in_batches(order, read, batch_size // processes, shape, options.num_threads, _CHUNK)


def _sorted_rows(feature: PictureFeature, model: nnx.Module, batch: Batch) -> Batch:
    """The feature of a batch by ascending index, and whether each row is finite."""
    rows = feature(model, batch["canvas"], batch["size"])
    index, valid = batch["index"], batch["valid"]
    finite = ~valid | jnp.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    order = jnp.argsort(jnp.where(index < 0, jnp.iinfo(jnp.int32).max, index))
    found = {"rows": rows, "index": index, "valid": valid, "finite": finite}
    return {name: values[order] for name, values in found.items()}


def _frame_batches(frames: Iterable[np.ndarray], batch_size: int) -> Iterator[HostBatch]:
    """This process's share of batches of frames; padding has index -1."""
    numbered, processes = enumerate(frames), jax.process_count()
    while chunk := list(itertools.islice(numbered, batch_size)):
        shape = chunk[0][1].shape
        canvas = np.zeros((batch_size // processes, *shape), np.uint8)
        index = np.full(len(canvas), -1, np.int32)
        for place, (number, frame) in enumerate(chunk[jax.process_index() :: processes]):
            canvas[place], index[place] = frame, number
        size = np.tile(np.int32(shape[:2]), (len(canvas), 1))
        yield {"canvas": canvas, "size": size, "index": index, "valid": index >= 0}
