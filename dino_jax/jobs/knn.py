"""The knn job: k-NN classification of frozen features."""

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
from dino_jax.data.sources import Source
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
from dino_jax.jobs import results
from dino_jax.output import check_writable
from dino_jax.paths import local_paths
from dino_jax.visualize.neighbours_sheet import neighbours_sheet

QUERIES, NEIGHBOURS = 10, 10  # rows and columns of the picture of neighbours


@local_paths
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
      train: Labelled training images: folder:/path, idx:/path@train, tfds:NAME@train, ...
      test: Labelled test images.
      ks: Numbers of neighbours; all are scored in one pass.
      temperature: Temperature of the votes.
      memory_budget: Bytes per device for a block of similarities, besides the features.
      output: The JSON file to write: scores, settings, the weights' hash, versions.
      report: A picture to write: some test images, each with its nearest training images.
      options: How features are computed.
      cache: Where features are stored.

    Returns: `{k: {"top1": percent, "top5": percent}}`.
    Raises:
      UsageError: something cannot be loaded, opened or written, or a setting is out of range.
    """
    check_votes(ks, temperature)
    if memory_budget < 1:
        raise UsageError(f"memory_budget={memory_budget} must be at least 1 byte")
    check_writable(output)
    if report:
        check_report(report)
    sources = open_labelled(train, test)
    extractor = Extractor(weights, options)
    feature = ClassToken()
    sides = extractor.features(feature, sources, cache)
    votes = {"ks": ks, "temperature": temperature, "memory_budget": memory_budget}
    scores = knn_of_sources(*sources, *sides, **votes, mesh=extractor.mesh)
    metrics = {"knn": scores, "unreadable_images": extractor.unreadable}
    metrics |= {"classes_without_test_images": len(untested_classes(*sources))}
    settings = {"weights": weights, "train": train, "test": test} | votes
    settings |= extractor.settings(feature) | dataclasses.asdict(cache)
    results.report(
        output,
        "knn",
        metrics,
        settings,
        extractor.info,
        header=["k", "top-1 %", "top-5 %"],
        rows=[[k, f"{row['top1']:.2f}", f"{row['top5']:.2f}"] for k, row in scores.items()],
        unreadable=extractor.unreadable,
    )
    if report and jax.process_index() == 0:
        draw_report(report, sources, sides)
    return scores


def check_report(path: Path) -> None:
    """Raises UsageError if no picture with this file name can be written."""
    try:  # Pillow can only read some formats, and some have no colours
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(
            f"report={path} cannot be written as a picture: use .png or .jpg"
        ) from error
    check_writable(path, "report")


def draw_report(path: Path, sources: tuple[Source, Source], sides: Sequence[Features]) -> None:
    """Draws some test images with their nearest training images.

    Args:
      path: of the picture.
      sources: training and test images.
      sides: their features.
    """
    (bank, queries), (bank_side, query_side) = sources, sides
    # The same test images for all weights, so that pictures can be compared; ordered by class.
    count = len(query_side.index)
    chosen = np.random.default_rng(0).permutation(count)[:QUERIES]
    chosen = chosen[np.argsort(query_side.labels[chosen], kind="stable")]
    similarities, rows = neighbours(
        bank_side.features,
        query_side.features[chosen],
        k=min(NEIGHBOURS, len(bank_side.index)),
        mesh=sharding.make_mesh(jax.local_devices()),  # only this host draws
    )
    found = bank_side.index[rows]
    neighbours_sheet(queries, bank, query_side.index[chosen], found, similarities).save(path)
