"""The logistic job: logistic regression on frozen features."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from dino_jax.errors import UsageError, about
from dino_jax.evaluate.classification.labelled import open_labelled, renumbered, untested_classes
from dino_jax.evaluate.classification.logistic import (
    ALL,
    check_labels,
    check_shots,
    few_of_each,
    fit_and_score,
    require_sklearn,
)
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import ClassToken
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths


@local_paths
def logistic(
    weights: str,
    train: str,
    test: str,
    shots: tuple[str, ...] = (ALL,),
    num_seeds: int = 5,
    c: float = 1.0,
    max_iterations: int = 1000,
    output: Path = Path("results.json"),
    options: Annotated[Extraction, arg(name="")] = Extraction(),
    cache: Annotated[FeatureCache, arg(name="")] = FeatureCache(),
) -> dict[str, dict[str, Any]]:
    """Logistic regression on frozen features, with all training images or a few per class.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      train: Labelled training images: folder:/path, idx:/path@train, tfds:NAME@train, ...
      test: Labelled test images.
      shots: How many training images to use: all, 1% or 10% of each class, 5 per class, ...
      num_seeds: Random subsets per setting; mean and standard deviation are reported.
      c: Inverse strength of the L2 penalty on standardised features.
      max_iterations: Limit of the solver.
      output: The JSON file to write: scores, settings, the weights' hash, versions.
      options: How features are computed.
      cache: Where features are stored.

    Returns: for each of `shots`: `top1` (the mean) and `std` in percent, `images`, the
      `top1_by_seed`, and whether all fits `converged`.
    Raises:
      UsageError: something cannot be loaded, opened or written, a setting is out of range, or
        scikit-learn is missing.
    """
    require_sklearn()
    check_shots(shots)
    if num_seeds < 1 or not c > 0 or max_iterations < 1:
        raise UsageError(
            f"num_seeds={num_seeds}, c={c} and max_iterations={max_iterations} must be above 0"
        )
    check_writable(output)
    fit = {"c": c, "max_iterations": max_iterations}
    given = {"weights": weights, "train": train, "test": test, "shots": shots}
    given |= {"num_seeds": num_seeds} | fit
    sources = open_labelled(train, test)
    names = sources[0].class_names
    if sources[0].labels is not None:
        with about(f"train={train}"):
            check_labels(sources[0].labels, shots, names)
    extractor, feature = Extractor(weights, options), ClassToken()
    bank, queries = extractor.features(feature, sources, cache)
    test_side = queries.features, renumbered(queries.labels, sources[1], names)
    with about(f"the readable images of train={train}"):
        check_labels(bank.labels, shots, names)
    metrics = {}
    for shot in shots:
        choices = [
            few_of_each(bank.labels, shot, seed) for seed in range(1 if shot == ALL else num_seeds)
        ]
        fits = [
            fit_and_score(bank.features[rows], bank.labels[rows], *test_side, **fit)
            for rows in choices
        ]
        metrics[shot] = summary(fits) | {"images": len(choices[0])}
    found = {"logistic": metrics, "unreadable_images": extractor.unreadable}
    report(
        output,
        "logistic",
        found | {"classes_without_test_images": len(untested_classes(*sources))},
        given | extractor.settings(feature) | dataclasses.asdict(cache),
        extractor.info,
        header=["shots", "images", "top-1 %", "std", "converged"],
        rows=[
            [shot, row["images"], f"{row['top1']:.2f}", f"{row['std']:.2f}", row["converged"]]
            for shot, row in metrics.items()
        ],
        unreadable=extractor.unreadable,
    )
    return metrics


def summary(fits: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds; 0 for a single seed."""
    tops = [fit["top1"] for fit in fits]
    return {
        "top1": float(np.mean(tops)),
        "std": float(np.std(tops, ddof=1)) if len(tops) > 1 else 0.0,
        "top1_by_seed": tops,
        "converged": all(fit["converged"] for fit in fits),
    }
