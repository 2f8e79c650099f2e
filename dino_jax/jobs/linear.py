"""The linear job: linear classifiers on frozen features."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from tyro.conf import arg

from dino_jax.checkpoints import lock
from dino_jax.data.sources import Source
from dino_jax.data.sources.subset import Subset
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.labelled import (
    num_classes_of,
    open_labelled,
    open_test,
    renumbered,
    untested_classes,
)
from dino_jax.evaluate.classification.linear_files import Progress
from dino_jax.evaluate.classification.linear_head import score_classifier
from dino_jax.evaluate.classification.linear_training import (
    HEAD,
    Protocol,
    Split,
    restore_or_init,
    train_heads,
)
from dino_jax.evaluate.features.cache import FeatureCache, describe_data
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import Feature, probed_feature
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths
from dino_jax.weights.linear import read_head

RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # the reference only has 0.001


@local_paths
def linear(
    weights: str,
    test: str,
    train: str | None = None,
    workdir: Path = Path("linear"),
    evaluate: str | None = None,
    learning_rates: tuple[float, ...] = RATES,
    epochs: int = 100,
    train_batch_size: int = 1024,
    n_last_blocks: int | None = None,
    avgpool_patchtokens: bool | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    options: Annotated[Extraction, arg(name="")] = Extraction(),
    cache: Annotated[FeatureCache, arg(name="")] = FeatureCache(),
) -> dict[str, Any]:
    """Trains linear classifiers on frozen features, one per learning rate, or scores a trained one.

    The same command resumes an interrupted training.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      test: Labelled test images: folder:/path, idx:/path@test, tfds:NAME@test, ...
      train: Labelled training images; not needed with --evaluate.
      workdir: Folder for results.json, log.txt, the best classifier and the state to resume from;
        for evaluate.json with --evaluate.
      evaluate: A trained classifier to score instead: head.npz of this job, a .pth file of the
        reference, or a hub name for the released one.
      learning_rates: Learning rates per 256 images; all are trained at once on the same crops.
      epochs: Training epochs.
      train_batch_size: Images per training step, over all devices.
      n_last_blocks: Number of last blocks of a ViT whose class tokens are used; default: 4, or 1
        for ViT-B and with --avgpool-patchtokens.
      avgpool_patchtokens: Add the mean of the last patch tokens; default: only for ViT-B, and only
        if --n-last-blocks is not set.
      hold_out: Share of the training images used to choose learning rate and epoch; 0 chooses them
        on the test images, as the reference does.
      seed: Seed of the initial weights, the order, the crops and the held-out images.
      options: How features are computed.
      cache: Where the features of test and held-out images are stored.

    Returns: the metrics: `top1`, `top5`, `learning_rate`, `epoch` (counted from 1; from 0 in
      log.txt, as in the reference), `chosen_on`, and those of all learning rates.
    Raises:
      UsageError: something cannot be loaded, opened or written, a setting is out of range, the
        workdir is in use, or a classifier does not match the features or classes.
    """
    _check(learning_rates, epochs, train_batch_size, hold_out)
    if (train is None) == (evaluate is None):
        raise UsageError("give either train=SOURCE to train a classifier, or evaluate=HEAD")
    output = workdir / ("evaluate.json" if train is None else "results.json")
    check_writable(output, "workdir")
    given = {name: x for name, x in locals().items() if name not in ("options", "cache", "workdir")}
    sources = (None, open_test(test)) if train is None else open_labelled(train, test)
    extractor = Extractor(weights, options)
    feature = probed_feature(extractor.model, n_last_blocks, avgpool_patchtokens)
    if train is None:
        head = read_head(evaluate)
        metrics = score_classifier(head, evaluate, extractor, feature, sources[1], cache)
        outcome = Outcome(metrics)
    else:
        protocol = Protocol(learning_rates, epochs, train_batch_size, seed)
        with lock.take(workdir) if jax.process_index() == 0 else nullcontext():
            outcome = _trained(extractor, feature, *sources, protocol, hold_out, workdir, cache)
    metrics = outcome.metrics | {"unreadable_images": extractor.unreadable}
    report(
        output,
        "linear",
        metrics,
        given | extractor.settings(feature) | dataclasses.asdict(cache),
        extractor.info,
        header=outcome.header,
        rows=outcome.rows,
        notes=[*outcome.notes, f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %"],
        unreadable=extractor.unreadable,
    )
    return metrics


class Outcome(NamedTuple):
    """Metrics, and what to print besides."""

    metrics: dict[str, Any]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def _trained(
    extractor: Extractor,
    feature: Feature,
    train: Source,
    test: Source,
    protocol: Protocol,
    hold_out: float,
    workdir: Path,
    cache: FeatureCache,
) -> Outcome:
    """Trains the classifiers, or resumes their training."""
    training, scored = train, {"test": test}
    if hold_out:
        order = np.random.default_rng(protocol.seed).permutation(len(train))
        number = max(1, round(hold_out * len(order)))
        held_out, kept = sorted(order[:number].tolist()), sorted(order[number:].tolist())
        scored = {"held_out": Subset(train, held_out, f"{hold_out} held out")} | scored
        training = Subset(train, kept, f"without {hold_out} held out")
    if len(training) < protocol.batch_size:
        raise UsageError(
            f"train_batch_size={protocol.batch_size} is larger than the {len(training)} images of "
            f"{training.spec}: choose a smaller one"
        )
    if protocol.batch_size % extractor.mesh.size:
        raise UsageError(
            f"train_batch_size={protocol.batch_size} is not divisible by the "
            f"{extractor.mesh.size} devices: choose a multiple"
        )
    settings = {
        "weights": extractor.info.sha256,
        "feature": repr(feature),
        "dtype": extractor.info.dtype,
        "transform": dataclasses.asdict(extractor.transform),
        "train": describe_data(training),
        "test": describe_data(test),
        "class_names": train.class_names,
        "hold_out": hold_out,
    } | dataclasses.asdict(protocol)
    (width,) = extractor.feature_shape(feature)
    progress = restore_or_init(workdir, settings, protocol, width, num_classes_of(train))
    found = extractor.features(feature, list(scored.values()), cache)
    splits = [
        Split(
            name,
            side.features,
            renumbered(side.labels, test, train.class_names) if name == "test" else side.labels,
        )
        for name, side in zip(scored, found, strict=True)
    ]
    progress = train_heads(
        progress,
        extractor,
        feature,
        training,
        splits,
        protocol,
        settings=settings,
        workdir=workdir,
    )
    metrics = {
        "replaced_training_images": len(progress.unreadable),
        "classes_without_test_images": len(untested_classes(train, test)),
    }
    notes = []
    if progress.unreadable:
        notes.append(
            f"unreadable images of {training.spec}, replaced by the next readable ones: "
            f"{len(progress.unreadable)}"
        )
    outcome = _summary(progress, protocol, splits[0].name, workdir)
    return outcome._replace(metrics=outcome.metrics | metrics, notes=[*notes, *outcome.notes])


def _summary(progress: Progress, protocol: Protocol, chosen_on: str, workdir: Path) -> Outcome:
    """The metrics of a training, and a table of the learning rates."""
    best, last = progress.best_record, progress.history[-1]
    tops = {"best_top1": "test_top1"}
    if chosen_on == "held_out":
        tops["best_held_out_top1"] = "held_out_top1"
    tops = {  # [R]
        name: np.max([record[metric] for record in progress.history], axis=0)
        for name, metric in tops.items()
    }
    rates = [
        {
            "learning_rate": rate,
            "last_top1": last["test_top1"][i],
            "last_top5": last["test_top5"][i],
            "last_train_loss": last["train_loss"][i],
        }
        | {name: float(top[i]) for name, top in tops.items()}
        for i, rate in enumerate(protocol.learning_rates)
    ]
    epoch = 1 + best["epoch"]
    words = {"test": "test images", "held_out": "training images held out"}[chosen_on]
    columns = {
        "learning_rate": "learning rate",
        "last_train_loss": "loss",
        "last_top1": "top-1 %",
        "last_top5": "top-5 %",
        "best_top1": "best top-1 %",
        "best_held_out_top1": "best held out %",
    }
    columns = {name: header for name, header in columns.items() if name in rates[0]}
    metrics = {
        "top1": best["test_top1"],
        "top5": best["test_top5"],
        "learning_rate": best["learning_rate"],
        "epoch": epoch,
        "chosen_on": words,
        "learning_rates": rates,
    }
    choice = (
        f"learning rate {best['learning_rate']:g}, epoch {epoch} of {protocol.epochs}, chosen on "
        f"the {words}; saved to {workdir / HEAD}"
    )
    rows = [[f"{rate[name]:.5g}" for name in columns] for rate in rates]
    return Outcome(metrics, list(columns.values()), rows, [choice])


def _check(
    learning_rates: tuple[float, ...], epochs: int, train_batch_size: int, hold_out: float
) -> None:
    if not learning_rates or not all(0 < rate < np.inf for rate in learning_rates):
        raise UsageError(f"learning_rates={learning_rates} must be one or more numbers above 0")
    if epochs < 1 or train_batch_size < 1:
        raise UsageError(
            f"epochs={epochs} and train_batch_size={train_batch_size} must be at least 1"
        )
    if not 0 <= hold_out < 1:
        raise UsageError(f"hold_out={hold_out} must be at least 0 and below 1")
