"""Training and test images of a classification: two sources whose classes agree."""

import logging
from typing import Any

import numpy as np

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import Features
from dino_jax.evaluate.knn import knn_accuracy


def open_labelled(train: str, test: str) -> tuple[Source, Source]:
    """Opens a bank of training images and the test images to be classified by it.

    Classes without test images are logged.

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
    if unknown := sorted(set(queries.class_names or ()) - set(bank.class_names or ())):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UsageError(
            f"{test} has classes that {train} lacks ({', '.join(unknown[:5])}{more}): "
            "give a bank with the same class folders"
        )
    if untested := untested_classes(bank, queries):
        logging.warning(
            "%s has no images of %d of the %d classes of %s, such as %s: no score tells of them",
            test,
            len(untested),
            len(bank.class_names),
            train,
            untested[0],
        )
    return bank, queries


def untested_classes(bank: Source, queries: Source) -> list[str]:
    """Classes of the bank without test images, by name; none where classes have no names."""
    return sorted(set(bank.class_names or ()) - set(queries.class_names or ()))


def open_test(spec: str) -> Source:
    """Opens labelled images.

    Raises:
      UsageError: they cannot be opened or have no labels.
    """
    source = open_source(spec)
    if source.label(0) < 0:
        raise UsageError(
            f"{spec} has no labels, which a classification needs: put its images into a folder for "
            "each class"
        )
    return source


def num_classes_of(source: Source) -> int:
    """By the names of the classes, else by the largest label."""
    if source.class_names is not None:
        return len(source.class_names)
    return 1 + max(source.label(i) for i in range(len(source)))


def labels_in_bank(bank: Source, queries: Source, labels: np.ndarray) -> np.ndarray:
    """Labels of the queries as the bank numbers its classes: classes of one name are one class.

    Args:
      bank: as `open_labelled` gives it.
      queries: likewise.
      labels: [Q] of the queries.
    """
    if bank.class_names is None:
        return labels
    number = {name: i for i, name in enumerate(bank.class_names)}
    return np.array([number[name] for name in queries.class_names], np.int32)[labels]


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
        labels_in_bank(bank, queries, query_features.labels),
        **settings,
    )
