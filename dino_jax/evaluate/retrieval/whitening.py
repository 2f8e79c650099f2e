"""PCA whitening of features, learned on images that take no part in the evaluation.

Dims: N images, D feature width.
"""

from typing import NamedTuple

import numpy as np

from dino_jax.errors import UsageError

SMALLEST = 1e-5  # an eigenvalue counts as at least this share of the largest


class Whitening(NamedTuple):
    """A shift and a rotation with scale."""

    mean: np.ndarray  # [D] float64
    matrix: np.ndarray  # [D, D] float64, a column for each component, the strongest first

    def apply(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, D] float64, along the components."""
        return (features - self.mean) @ self.matrix


def learn_whitening(features: np.ndarray, power: float = 0.5) -> Whitening:
    """Learns what makes features alike in all directions.

    As in the reference, what is whitened is centred, but the covariance it is learned from is that
    of the features as they are.

    Args:
      features: [N, D] of other images than those to be whitened.
      power: of the eigenvalues that a component is divided by; 0.5 gives all the same spread.
    Raises:
      UsageError: there is no image.
    """
    if len(features) == 0:
        raise UsageError("whitening got 0 images to learn from; it needs at least one")
    features = np.asarray(features, np.float64)
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    values = np.maximum(values, SMALLEST * values.max())[::-1]
    return Whitening(features.mean(axis=0), vectors[:, ::-1] / values**power)
