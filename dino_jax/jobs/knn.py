"""The k-NN job: from weights and two sources to a table."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
from tyro.conf import arg

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.knn import KS, check_votes
from dino_jax.evaluate.classification.labelled import (
    knn_of_sources,
    open_labelled,
    untested_classes,
)
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import ClassToken
from dino_jax.jobs.results import check_writable, print_unreadable, table, write_results
from dino_jax.visualize.neighbours import check_picture, write_report


def knn(
    weights: str,
    train: str,
    test: str,
    ks: tuple[int, ...] = KS,
    temperature: float = 0.07,
    memory_budget: int = 1 << 30,
    output: Path = Path("results.json"),
    options: Annotated[Extraction, arg(name="")] = Extraction(),
    cache: Annotated[FeatureCache, arg(name="")] = FeatureCache(),
    report: Path | None = None,
) -> dict[int, dict[str, float]]:
    """Classifies test images by their nearest training images in feature space.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      train: The labelled bank: folder:/path, idx:/path@train, tfds:NAME@train, shapes:N@train.
      test: The labelled images to classify.
      ks: Numbers of neighbours; all in one pass.
      temperature: Of the votes.
      memory_budget: Bytes on each device for a block of similarities, besides the features.
      output: The JSON file to write: scores, settings, weights' hash, versions.
      report: A picture to write: some test images, each with its nearest training images.
      options: How features are computed.
      cache: Where features are kept.

    Returns: `{k: {"top1": percent, "top5": percent}}`.
    Raises:
      UsageError: something cannot be loaded, opened or written, or a setting is out of range.
    """
    check_votes(ks, temperature)
    if memory_budget < 1:
        raise UsageError(f"memory_budget={memory_budget} must be at least 1 byte")
    check_writable(output)
    if report:
        check_picture(report)
    sources = open_labelled(train, test)
    extractor = Extractor(weights, options)
    feature = ClassToken()
    sides = extractor.features(feature, sources, cache)
    votes = {"ks": ks, "temperature": temperature, "memory_budget": memory_budget}
    scores = knn_of_sources(*sources, *sides, **votes, mesh=extractor.mesh)
    if jax.process_index() == 0:
        rows = [[k, f"{row['top1']:.2f}", f"{row['top5']:.2f}"] for k, row in scores.items()]
        print(table(["k", "top-1 %", "top-5 %"], rows))
        print_unreadable(extractor.unreadable)
        metrics = {"knn": scores, "unreadable_images": extractor.unreadable}
        metrics |= {"classes_without_test_images": len(untested_classes(*sources))}
        settings = {"weights": weights, "train": train, "test": test} | votes
        settings |= extractor.settings(feature) | dataclasses.asdict(cache)
        write_results(output, "knn", metrics, settings, extractor.info)
        if report:
            write_report(report, sources, sides)
    return scores
