"""Training and test images of a classification: two sources whose classes agree."""

import logging
from typing import Any

import numpy as np

from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError, listed
from dino_jax.evaluate.classification.knn import knn_accuracy
from dino_jax.evaluate.features.square_pass import Features


def open_labelled(train: str, test: str) -> tuple[Source, Source]:
    """Opens a bank of training images and the test images to be classified by it.

    Classes are those that occur in the labels: a part of a source may hold few. Classes without
    test images are logged.

    Raises:
      UsageError: one cannot be opened or has no labels, or the test images have a class that the
        bank lacks.
    """
    bank, queries = open_test(train), open_test(test)
    if (bank.class_names is None) != (queries.class_names is None):
        raise UsageError(
            f"of {train} and {test} one names its classes and the other numbers them: "
            "give two sources of one kind"
        )
    if unknown := untested_classes(queries, bank):
        raise UsageError(
            f"{test} has classes that {train} lacks ({listed(unknown)}): "
            "give a bank with images of all (folders are sorted by class: a part [a:b] has few)"
        )
    if untested := untested_classes(bank, queries):
        logging.warning(
            "%s has no images of %d of the %d classes of %s, such as %s: no score tells of them",
            test,
            len(untested),
            len(classes_of(bank)),
            train,
            untested[0],
        )
    return bank, queries


def classes_of(source: Source) -> set[str] | set[int]:
    """The classes that occur, by name, else by number."""
    if source.labels is None:  # only the records tell
        return set(source.class_names)
    numbers = np.unique(source.labels).tolist()
    return {source.class_names[i] for i in numbers} if source.class_names else set(numbers)


def untested_classes(bank: Source, queries: Source) -> list[str] | list[int]:
    """Classes of the bank without test images, by name, else by number."""
    return sorted(classes_of(bank) - classes_of(queries))


def open_test(spec: str) -> Source:
    """Opens labelled images.

    Raises:
      UsageError: they cannot be opened or have no labels.
    """
    source = open_source(spec)
    if source.label(0) < 0:
        raise UsageError(
            f"{spec} has no labels, which a classification needs: put its images into a folder for "
            f"each class, and none beside these folders; the first one is {source.name(0)}"
        )
    return source


def num_classes_of(source: Source) -> int:
    """By the names of the classes, else by the largest label."""
    if source.class_names is not None:
        return len(source.class_names)
    return 1 + max(source.label(i) for i in range(len(source)))


def renumbered(
    labels: np.ndarray, queries: Source, class_names: tuple[str, ...] | None
) -> np.ndarray:
    """Labels of the queries as others number the classes: classes of one name are one class.

    Args:
      labels: [Q] of the queries.
      queries: have no images of classes that the others lack.
      class_names: of the others; None where neither has names.
    """
    if class_names is None:
        return labels
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(name, -1) for name in queries.class_names], np.int32)[labels]


def knn_of_sources(
    bank: Source,
    queries: Source,
    bank_features: Features,
    query_features: Features,
    **settings: Any,
) -> dict[int, dict[str, float]]:
    """The k-NN table of two sources.

    Args:
      bank: as `open_labelled` gives it.
      queries: likewise.
      bank_features: as `features.extract` gives them for the bank.
      query_features: likewise for the queries.
      **settings: of `knn_accuracy`.
    Returns: `{k: {"top1": percent, "top5": percent}}`.
    """
    return knn_accuracy(
        bank_features.features,
        bank_features.labels,
        query_features.features,
        renumbered(query_features.labels, queries, bank.class_names),
        **settings,
    )
