"""Labelled training and test images: two sources with matching classes."""

import logging
from typing import Any

import numpy as np

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError, listed
from dino_jax.evaluate.classification.knn import knn_accuracy
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.text import same_class


def open_labelled(train: str, test: str) -> tuple[Source, Source]:
    """Opens training images and the test images to classify with them.

    Only classes that occur in the labels count, as a slice of a source may lack some. Classes
    without test images are logged.

    Raises:
      UsageError: a source cannot be opened or has no labels, or a class of the test images has no
        training images.
    """
    bank, queries = open_test(train), open_test(test)
    if (bank.class_names is None) != (queries.class_names is None):
        raise UsageError(
            f"one of {train} and {test} has class names and the other has numbers: "
            "use two sources of the same kind"
        )
    if unknown := untested_classes(queries, bank):
        raise UsageError(
            f"{test} has classes that {train} lacks ({listed(unknown)}): use a training set "
            "that covers every test class (a slice [a:b] of a folder lacks some, because images "
            "are sorted by class)"
        )
    if untested := untested_classes(bank, queries):
        logging.warning(
            "%s has no images of %d of the %d classes of %s, such as %s: they are not evaluated",
            test,
            len(untested),
            len(classes_of(bank)),
            train,
            untested[0],
        )
    return bank, queries


def classes_of(source: Source) -> set[str] | set[int]:
    """The classes that occur: their names, or their numbers if they have no names."""
    if source.labels is None:  # labels are only in the records
        return set(map(same_class, source.class_names))
    numbers = np.unique(source.labels).tolist()
    return (
        {same_class(source.class_names[i]) for i in numbers} if source.class_names else set(numbers)
    )


def untested_classes(bank: Source, queries: Source) -> list[str] | list[int]:
    """Classes of the bank without test images: names, or numbers if they have no names."""
    return sorted(classes_of(bank) - classes_of(queries))


def open_test(spec: str) -> Source:
    """Opens labelled images.

    Raises:
      UsageError: the source cannot be opened or has no labels.
    """
    source = open_source(spec)
    if source.label(0) < 0:
        raise UsageError(
            f"{spec} has no labels, which classification needs: put the images of each class "
            f"into a folder of its own, and none beside these folders, such as {source.name(0)}"
        )
    return source


def num_classes_of(source: Source) -> int:
    """The number of class names, or the largest label plus one if there are no names."""
    if source.class_names is not None:
        return len(source.class_names)
    return 1 + max(source.label(i) for i in range(len(source)))


def renumbered(
    labels: np.ndarray, queries: Source, class_names: tuple[str, ...] | None
) -> np.ndarray:
    """Converts labels of the queries to the class numbers of another source, by class name.

    Args:
      labels: [Q] of the queries.
      queries: every class of theirs occurs in `class_names`.
      class_names: of the other source; None if neither has names.
    """
    if class_names is None:
        return labels
    number = {same_class(name): i for i, name in enumerate(class_names)}
    return np.array([number.get(same_class(name), -1) for name in queries.class_names], np.int32)[
        labels
    ]


def knn_of_sources(
    bank: Source,
    queries: Source,
    bank_features: Features,
    query_features: Features,
    **settings: Any,
) -> dict[int, dict[str, float]]:
    """The k-NN table of two sources.

    Args:
      bank: training images, from `open_labelled`.
      queries: test images, likewise.
      bank_features: features of the bank.
      query_features: features of the queries.
      **settings: as in `knn_accuracy`.
    Returns: `{k: {"top1": percent, "top5": percent}}`.
    """
    return knn_accuracy(
        bank_features.features,
        bank_features.labels,
        query_features.features,
        renumbered(query_features.labels, queries, bank.class_names),
        **settings,
    )
