"""Bank and queries of a classification: two sources whose classes agree."""

from collections.abc import Sequence

import numpy as np

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import Features
from dino_jax.evaluate.knn import knn_accuracy


def open_labelled(train: str, test: str) -> tuple[Source, Source]:
    """Opens a bank of training images and the test images to be classified by it.

    Raises:
      UsageError: one cannot be opened or has no labels, or the test images have a class that the
        bank lacks.
    """
    bank, queries = open_source(train), open_source(test)
    for source in (bank, queries):
        if source.label(0) < 0:
            raise UsageError(
                f"{source.spec} has no labels, which k-NN needs: put its images into a folder for "
                "each class"
            )
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
    return bank, queries


def knn_of_sources(
    bank: Source,
    queries: Source,
    bank_features: Features,
    query_features: Features,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, dict[str, float]]:
    """The k-NN table of two sources; classes of one name are one class.

    Args:
      bank: as `open_labelled` gives it.
      queries: likewise.
      bank_features: as `features.extract` gives them for the bank.
      query_features: likewise for the queries.
      ks: numbers of neighbours.
      temperature: of the votes.
    Returns: `{k: {"top1": percent, "top5": percent}}`.
    """
    test_labels = query_features.labels
    if bank.class_names is not None:
        number = {name: i for i, name in enumerate(bank.class_names)}
        test_labels = np.array([number[name] for name in queries.class_names])[test_labels]
    return knn_accuracy(
        bank_features.features,
        bank_features.labels,
        query_features.features,
        test_labels,
        ks=ks,
        temperature=temperature,
    )
