"""Trains linear classifiers on a frozen backbone, and keeps the best one.

Dims: B images, R learning rates.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from dino_jax import sharding
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.sources import Source
from dino_jax.data.transforms.random_crop import random_crop
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.linear import (
    Heads,
    Probe,
    learning_rates,
    new_probe,
    probe_step,
    score_heads,
)
from dino_jax.evaluate.classification.linear_files import Progress, read_progress, write_progress
from dino_jax.evaluate.features.compiled import compile_backbone
from dino_jax.evaluate.features.extractor import Extractor
from dino_jax.evaluate.features.square_pass import Batch
from dino_jax.evaluate.features.tokens import Feature
from dino_jax.output import whole_or_nothing
from dino_jax.weights.linear import LinearHead, write_head

PROGRESS, HEAD, LOG = "progress.npz", "head.npz", "log.txt"


@dataclasses.dataclass(frozen=True)
class Split:
    """Features and labels that classifiers are scored on."""

    name: str  # "test" or "held_out"
    features: np.ndarray  # [B, F]
    labels: np.ndarray  # [B] int32


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the classifiers are trained."""

    learning_rates: tuple[float, ...]  # R, per 256 images
    epochs: int
    batch_size: int  # over all devices
    seed: int


def compile_probe_step(extractor: Extractor, feature: Feature, seed: int) -> Callable[..., Any]:
    """Compiles a training step, from canvases to updated classifiers; the backbone is frozen.

    Args:
      extractor: of the backbone.
      feature: the feature to classify.
      seed: of the crops; the crop of an image only depends on the seed, the epoch and its index.
    Returns: a function of (params, batch_stats, probe, batch, epoch, rates [R]) that returns the
      new probe and the losses [R]; the old probe is donated.
    """
    transform = extractor.transform

    def step(
        model: nnx.Module, probe: Probe, batch: Batch, epoch: jax.Array, rates: jax.Array
    ) -> tuple[Probe, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        images = random_crop(
            batch["canvas"],
            batch["size"],
            keys,
            side=transform.crop,
            mean=transform.mean,
            std=transform.std,
        )
        return probe_step(probe, feature(model, images), batch["label"], rates)

    return compile_backbone(step, extractor.graphdef, extractor.mesh, donate_argnums=(2,))


def restore_or_init(
    workdir: Path, settings: dict[str, Any], protocol: Protocol, width: int, num_classes: int
) -> Progress:
    """Reads the state of the training in the workdir, or starts a new training.

    Args:
      workdir: of the training.
      settings: must be the same when a training is resumed.
      protocol: of the training.
      width: of the features.
      num_classes: of the classifiers.
    Raises:
      UsageError: the training in the workdir is damaged or has other settings, or hosts do not
        share the workdir.
    """
    if (workdir / PROGRESS).exists():
        progress = read_progress(workdir / PROGRESS, settings)
    else:
        key = jax.random.key(protocol.seed)
        progress = Progress(new_probe(key, len(protocol.learning_rates), width, num_classes))
    done = np.array(len(progress.history), np.int32)
    everywhere = multihost_utils.process_allgather(done)
    if (everywhere != done).any():
        raise UsageError(
            f"workdir={workdir} must be a folder that all hosts share: they find "
            f"{np.unique(everywhere).tolist()} trained epochs there"
        )
    return progress


def train_heads(
    progress: Progress,
    extractor: Extractor,
    feature: Feature,
    source: Source,
    splits: list[Split],
    protocol: Protocol,
    *,
    settings: dict[str, Any],
    workdir: Path,
) -> Progress:
    """Trains a classifier for each learning rate.

    Keeps the best one over all rates and epochs, by top-1 on the first split.

    Args:
      progress: the start, from `restore_or_init`.
      extractor: of the backbone.
      feature: the feature to classify, [F] for an image.
      source: labelled training images. The last, incomplete batch of an epoch is dropped.
      splits: to score on after every epoch.
      protocol: of the training.
      settings: must be the same when the training is resumed.
      workdir: for `log.txt`, `head.npz` (the best classifier) and `progress.npz` (the state).
    Returns: the progress after the last epoch.
    Raises:
      UsageError: a loss is not finite; the state of the epoch before is kept.
    """
    mesh, options = extractor.mesh, extractor.options
    probe = jax.device_put(progress.probe, sharding.replicated(mesh))
    progress = dataclasses.replace(progress, probe=probe)
    done, steps = len(progress.history), len(source) // protocol.batch_size
    records = Records(
        source,
        max_unreadable=options.max_unreadable,
        max_pixels=options.max_pixels,
        channels=len(extractor.info.mean),
    )
    batches = train_batches(
        records,
        batch_size=protocol.batch_size,
        seed=protocol.seed,
        start_step=done * steps,
        canvas_size=extractor.transform.canvas_size,
        num_threads=options.num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step = compile_probe_step(extractor, feature, protocol.seed)
    bar = tqdm(
        total=protocol.epochs * steps * protocol.batch_size,
        initial=done * steps * protocol.batch_size,
        desc="linear",
        unit=" images",
        disable=jax.process_index() != 0,
    )
    with bar, DevicePrefetch(batches, sharding.batch_sharded(mesh)) as on_device:
        for epoch in range(done, protocol.epochs):
            rates = learning_rates(
                protocol.learning_rates,
                batch_size=protocol.batch_size,
                epoch=epoch,
                epochs=protocol.epochs,
            )
            probe, losses = progress.probe, []
            for _ in range(steps):
                probe, loss = step(*extractor.weights, probe, next(on_device), epoch, rates)
                losses.append(loss)
                if len(losses) > 1:
                    # Wait for the step before, so that batches do not pile up on the device.
                    losses[-2] = np.asarray(losses[-2])
                bar.update(protocol.batch_size)
            record = {"epoch": epoch, "train_lr": rates.tolist()}
            record["train_loss"] = np.mean([np.asarray(x) for x in losses], axis=0).tolist()
            _check_finite(record["train_loss"], protocol)
            progress = dataclasses.replace(
                _scored(progress, probe, splits, record, protocol),
                unreadable=progress.unreadable | _everywhere(records.unreadable, len(source)),
            )
            if jax.process_index() == 0:
                _write(workdir, settings, progress)
    return progress


def _check_finite(losses: list[float], protocol: Protocol) -> None:
    for rate, loss in zip(protocol.learning_rates, losses, strict=True):
        if not math.isfinite(loss):
            raise UsageError(
                f"learning_rates={protocol.learning_rates}: the loss of {rate:g} is {loss}: remove "
                "that rate; if others fail, too, the weights are broken"
            )


def _everywhere(indices: frozenset[int], length: int) -> frozenset[int]:
    """The union over all hosts of indices below `length`."""
    found = np.zeros(length, bool)
    found[list(indices)] = True
    found = multihost_utils.process_allgather(found).reshape(-1, length).any(axis=0)
    return frozenset(np.flatnonzero(found).tolist())


def _scored(
    progress: Progress,
    probe: Probe,
    splits: list[Split],
    record: dict[str, Any],
    protocol: Protocol,
) -> Progress:
    """Scores all classifiers after an epoch, and updates the best one."""
    best, best_record = progress.best, progress.best_record
    for i, split in enumerate(splits):
        found = score_heads(probe.heads, split.features, split.labels)
        record |= {f"{split.name}_{name}": values.tolist() for name, values in found.items()}
        rate = int(np.argmax(found["top1"]))
        if i == 0 and (best is None or found["top1"][rate] > best_record[f"{split.name}_top1"]):
            best = _one(probe.heads, rate)
            best_record = {"rate": rate, "epoch": record["epoch"]}
            best_record["learning_rate"] = protocol.learning_rates[rate]
    if best_record["epoch"] == record["epoch"]:
        best_record |= {
            name: record[name][best_record["rate"]]
            for name in record
            if name.endswith(("_top1", "_top5"))
        }
    return Progress(probe, best, best_record, [*progress.history, record])


def _one(heads: Heads, rate: int) -> LinearHead:
    return LinearHead(np.asarray(heads.kernel[rate]), np.asarray(heads.bias[rate]))


def _write(workdir: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Writes the state last, so that everything it refers to exists."""
    if progress.best_record["epoch"] == progress.history[-1]["epoch"]:
        write_head(
            workdir / HEAD,
            dataclasses.replace(
                progress.best,
                weights=settings["weights"],
                feature=settings["feature"],
                class_names=settings["class_names"],
            ),
        )
    lines = (json.dumps(record) for record in progress.history)
    with whole_or_nothing(workdir / LOG) as part:
        part.write_text("\n".join(lines) + "\n")
    write_progress(workdir / PROGRESS, settings, progress)
