"""Features of all images of a source, each transformed to one square crop.

Dims: N images, B images of a batch, D feature width.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dino_jax import sharding
from dino_jax.config.spec import ModelSpec
from dino_jax.data.pipeline import Records, eval_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.transforms.eval_transform import eval_transform
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.compiled import compile_backbone
from dino_jax.evaluate.features.tokens import ClassToken, Feature

PyTree = Any
Batch = dict[str, jax.Array]
FeatureFn = Callable[[PyTree, PyTree, Batch], Batch]


class Features(NamedTuple):
    """The features of a source: a row for every readable image, in order."""

    features: np.ndarray  # [N, ...] float32, usually [N, D]
    labels: np.ndarray  # [N] int32, -1 without a label
    index: np.ndarray  # [N] int32, position in the source


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """How an image becomes the input of the network (paper, appendix F.1); sizes in pixels."""

    resize: int = ModelSpec.resize  # shorter side, bicubic
    crop: int = ModelSpec.crop  # centre
    canvas_size: int = ModelSpec.canvas_size  # larger images are resized on the host
    mean: tuple[float, ...] = ModelSpec.mean
    std: tuple[float, ...] = ModelSpec.std


def feature_function(
    graphdef: nnx.GraphDef,
    transform: EvalTransform,
    mesh: Mesh,
    feature: Feature = ClassToken(),
) -> FeatureFn:
    """Compiles the features of one batch of canvases.

    Args:
      graphdef: of a backbone in evaluation mode.
      transform: how canvases become images.
      mesh: the devices that share a batch.
      feature: which outputs of the backbone to use.
    Returns: a function of (params, batch_stats, batch) that returns `features [B, ...]` and the
      batch's `labels [B]`, `index [B]` and `valid [B]`, replicated on all devices and hosts.
    """

    def features(model: nnx.Module, batch: Batch) -> Batch:
        images = eval_transform(
            batch["canvas"],
            batch["size"],
            batch["done"],
            resize=transform.resize,
            crop=transform.crop,
            mean=transform.mean,
            std=transform.std,
        )
        kept = {"labels": batch["label"], "index": batch["index"], "valid": batch["valid"]}
        return {"features": feature(model, images)} | kept

    return compile_backbone(features, graphdef, mesh)


def stream(
    feature_fn: Callable[[Batch], Batch],
    records: Records,
    transform: EvalTransform,
    *,
    batch_size: int,
    num_threads: int,
    mesh: Mesh,
) -> Iterator[Features]:
    """Features of every readable image, in order, batch by batch.

    Args:
      feature_fn: from `feature_function`, with the weights bound.
      records: the images.
      transform: as given to `feature_function`.
      batch_size: images per batch, over all devices; rounded up to a multiple of their number.
      num_threads: threads that decode images.
      mesh: the devices that share a batch.
    Returns: features, labels and indices in the source; unreadable images are skipped.
    Raises:
      UsageError: too many images are unreadable, or a feature is not finite.
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

    def fetch(output: Batch) -> Features:
        rows = jax.device_get(output)
        kept = np.flatnonzero(rows.pop("valid"))
        kept = kept[np.argsort(rows["index"][kept])]  # hosts are interleaved within a batch
        found = Features(**{name: values[kept] for name, values in rows.items()})
        finite = np.isfinite(found.features).all(axis=tuple(range(1, found.features.ndim)))
        check_finite(finite, found.index, records.source.name)
        return found

    return map(fetch, one_ahead(feature_fn, batches, mesh))


def check_finite(is_finite: np.ndarray, index: np.ndarray, name: Callable[[int], str]) -> None:
    """Rejects features of broken weights, whose scores would be meaningless.

    Args:
      is_finite: [B] bool, for each image whether its whole feature is finite.
      index: [B] in the source.
      name: gives the name of an image.
    Raises:
      UsageError: a feature is not finite.
    """
    if not is_finite.all():
        broken = name(int(index[np.argmin(is_finite)]))
        raise UsageError(
            f"the features of {broken} contain a value that is not finite: the weights are broken, "
            "or the compute dtype overflows (try float32)"
        )


def one_ahead(
    compute: Callable[[Batch], Batch], batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> Iterator[Batch]:
    """Yields the result of each batch once the next one has been dispatched.

    Args:
      compute: maps a batch on the devices to arrays on the devices.
      batches: this process's share of each batch; at least one batch.
      mesh: the devices that share a batch.
    """
    pending = None
    with DevicePrefetch(batches, sharding.batch_sharded(mesh)) as on_device:
        for batch in on_device:
            output = compute(batch)
            if pending is not None:
                yield pending
            pending = output
    yield pending


def extract(
    feature_fn: Callable[[Batch], Batch],
    records: Records,
    transform: EvalTransform,
    **settings: Any,
) -> Features:
    """Features of every readable image, in order; arguments as in `stream`."""
    return join(stream(feature_fn, records, transform, **settings))


def join(parts: Iterable[Features]) -> Features:
    """Concatenates the rows of all parts."""
    return Features(*map(np.concatenate, zip(*parts, strict=True)))
