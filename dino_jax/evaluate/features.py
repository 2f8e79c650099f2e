"""Frozen features of all images of a source.

Dims: N images, B a batch, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dino_jax import sharding
from dino_jax.data.pipeline import Records, eval_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.preprocess import eval_transform

PyTree = Any
Batch = dict[str, jax.Array]
FeatureFn = Callable[[PyTree, PyTree, Batch], Batch]


class Features(NamedTuple):
    """What a pass over a source gives: a row for every readable image, in order."""

    features: np.ndarray  # [N, D] float32
    labels: np.ndarray  # [N] int32, -1 for none
    index: np.ndarray  # [N] int32, in the source


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """How an image becomes the network's input (paper, appendix F.1), in pixels."""

    resize: int = 256  # shorter side, bicubic
    crop: int = 224  # centre
    canvas_size: int = 512  # larger images are resized by the host
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def feature_function(graphdef: nnx.GraphDef, transform: EvalTransform, mesh: Mesh) -> FeatureFn:
    """Compiles the pass over one batch of canvases.

    Args:
      graphdef: of a backbone in evaluation mode.
      transform: how canvases become images.
      mesh: the devices that share a batch.
    Returns: maps (params, batch_stats, batch) to `features [B, D]` and the batch's own
      `labels [B]`, `index [B]` and `valid [B]`, all of them whole on every device and host.
    """

    def features(params: PyTree, batch_stats: PyTree, batch: Batch) -> Batch:
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        images = eval_transform(
            batch["canvas"],
            batch["size"],
            batch["done"],
            resize=transform.resize,
            crop=transform.crop,
            mean=transform.mean,
            std=transform.std,
        )
        model = nnx.merge(graphdef, params, batch_stats)
        kept = {"labels": batch["label"], "index": batch["index"], "valid": batch["valid"]}
        return {"features": model(images)} | kept

    return jax.jit(features, out_shardings=sharding.replicated(mesh))


def extract(
    feature_fn: Callable[[Batch], Batch],
    records: Records,
    transform: EvalTransform,
    *,
    batch_size: int,
    num_threads: int,
    mesh: Mesh,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Features:
    """Features of every readable image, in order.

    Args:
      feature_fn: as `feature_function` gives it, with its weights bound.
      records: the images.
      transform: as given to `feature_function`.
      batch_size: images at a time over all devices; rounded up to a multiple of their number.
      num_threads: that decode images.
      mesh: the devices that share a batch.
      on_batch: called with the number of images of each finished batch, for a progress bar.
    Returns: features, labels and indices in the source; an image that cannot be read is left out.
    """
    batches = eval_batches(
        records,
        batch_size=-(-min(batch_size, len(records)) // mesh.size) * mesh.size,
        canvas_size=transform.canvas_size,
        resize=transform.resize,
        crop=transform.crop,
        num_threads=num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    parts = []
    with DevicePrefetch(batches, sharding.batch_sharded(mesh)) as on_device:
        for batch in on_device:
            output = jax.device_get(feature_fn(batch))
            valid = output.pop("valid")
            parts.append(Features(**{name: rows[valid] for name, rows in output.items()}))
            on_batch(len(parts[-1].index))
    joined = Features(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.argsort(joined.index)  # hosts take turns within a batch
    return Features(*(rows[order] for rows in joined))
