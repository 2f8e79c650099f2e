"""Logistic regression on frozen features, with all training images or a few per class.

Features are standardised by mean and standard deviation of the training images; scikit-learn does
the fit.

Dims: N training images, Q test images, D width.
"""

import re
import warnings
from typing import Any

import numpy as np

from dino_jax.errors import UsageError

ALL = "all"
_SHOT = re.compile(r"(?P<share>\d+(\.\d+)?)%|(?P<number>\d+)")


def require_sklearn() -> None:
    """Raises UsageError if scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401 - half a second, which other jobs need not pay
    except ImportError as error:
        raise UsageError(
            "logistic regression needs scikit-learn: pip install scikit-learn"
        ) from error


def fit_and_score(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    c: float,
    max_iterations: int,
) -> dict[str, Any]:
    """Fits a classifier and scores it.

    Args:
      train_features: [N, D].
      train_labels: [N], at least two classes, not necessarily contiguous.
      test_features: [Q, D].
      test_labels: [Q].
      c: inverse strength of the L2 penalty, as in scikit-learn.
      max_iterations: of L-BFGS.
    Returns: `top1` in percent, and whether the fit `converged`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean = train_features.mean(axis=0)
    deviation = np.maximum(train_features.std(axis=0), 1e-6)
    classifier = LogisticRegression(C=c, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
        classifier.fit((train_features - mean) / deviation, train_labels)
    right = classifier.predict((test_features - mean) / deviation) == test_labels
    converged = bool(np.max(classifier.n_iter_) < max_iterations)
    return {"top1": 100 * float(right.mean()), "converged": converged}


def check_shots(shots: tuple[str, ...]) -> None:
    """Raises UsageError unless each is "all", a share or a number of images."""
    for shot in shots:
        match = _SHOT.fullmatch(shot)
        if shot == ALL:
            continue
        if not match or not 0 < float(match["share"] or match["number"]) <= (
            100 if match["share"] else np.inf
        ):
            raise UsageError(
                f"shots={shot!r} must be {ALL}, a number of images per class (5), or a share (1%)"
            )


def check_labels(
    labels: np.ndarray, shots: tuple[str, ...], class_names: tuple[str, ...] | None = None
) -> None:
    """Checks that training images can be fitted.

    Args:
      labels: [N].
      shots: as in `few_of_each`.
      class_names: by label, for the message.
    Raises:
      UsageError: there is a single class, or a class has fewer images than requested.
    """
    if len(np.unique(labels)) < 2:
        raise UsageError("all images belong to a single class: use images of at least two classes")
    for shot in shots:
        few_of_each(labels, shot, seed=0, class_names=class_names)


def few_of_each(
    labels: np.ndarray, shot: str, seed: int, class_names: tuple[str, ...] | None = None
) -> np.ndarray:
    """Draws a random subset of the training images, class by class.

    Args:
      labels: [N].
      shot: "5" for five per class, "1%" for that share of each class, rounded, at least one; "all".
      seed: of the draw.
      class_names: by label, for the message.
    Returns: ascending indices.
    Raises:
      UsageError: a class has fewer images than requested.
    """
    if shot == ALL:
        return np.arange(len(labels))
    match = _SHOT.fullmatch(shot)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        if match["share"]:
            number = max(1, round(len(here) * float(match["share"]) / 100))
        else:
            number = int(match["number"])
        if number > len(here):
            name = class_names[label] if class_names else label
            raise UsageError(
                f"shots={shot!r}: class {name} has only {len(here)} training images: use at most "
                "that many per class"
            )
        chosen.append(rng.choice(here, number, replace=False))
    return np.sort(np.concatenate(chosen))
