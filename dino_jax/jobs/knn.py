"""The k-NN job: from weights and two sources to a table."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image
from tyro.conf import arg

from dino_jax import sharding
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.knn import KS, check_votes
from dino_jax.evaluate.classification.labelled import (
    knn_of_sources,
    open_labelled,
    untested_classes,
)
from dino_jax.evaluate.classification.neighbours import neighbours
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.evaluate.features.tokens import ClassToken
from dino_jax.jobs.results import print_unreadable, table, write_results
from dino_jax.output import check_writable
from dino_jax.visualize.neighbours_sheet import neighbours_sheet

QUERIES, NEIGHBOURS = 10, 10  # rows of a report, and neighbours in each


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


def check_picture(path: Path) -> None:
    """Raises UsageError where a picture of this name cannot be written."""
    try:  # some formats are for reading alone, others for pictures without colours
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(
            f"report={path} must be named as a picture that can be written: end it in .png or .jpg"
        ) from error
    check_writable(path, "report")


def write_report(path: Path, sources: tuple[Source, Source], sides: Sequence[Features]) -> None:
    """Draws some test images with their nearest training images.

    Args:
      path: of the picture.
      sources: bank and queries.
      sides: their features.
    """
    (bank, queries), (bank_side, query_side) = sources, sides
    # The same queries for all weights, so that reports can be compared; ordered by class.
    count = len(query_side.index)
    chosen = np.random.default_rng(0).permutation(count)[:QUERIES]
    chosen = chosen[np.argsort(query_side.labels[chosen], kind="stable")]
    similarities, rows = neighbours(
        bank_side.features,
        query_side.features[chosen],
        k=min(NEIGHBOURS, len(bank_side.index)),
        mesh=sharding.make_mesh(jax.local_devices()),  # one host draws, without the others
    )
    found = bank_side.index[rows]
    neighbours_sheet(queries, bank, query_side.index[chosen], found, similarities).save(path)
