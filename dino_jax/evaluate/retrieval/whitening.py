"""PCA whitening of features, learned on images outside the evaluation.

Dims: N images, D feature width.
"""

from typing import NamedTuple

import numpy as np

from dino_jax.errors import UsageError

SMALLEST = 1e-5  # lower limit of an eigenvalue, as a share of the largest


class Whitening(NamedTuple):
    """A shift, a rotation and a scale."""

    mean: np.ndarray  # [D] float64
    matrix: np.ndarray  # [D, D] float64, one column per component, strongest first

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Projects features on the components: [N, D] -> [N, D] float64."""
        return (features - self.mean) @ self.matrix


def learn_whitening(features: np.ndarray, power: float = 0.5) -> Whitening:
    """Learns a transform that gives features unit covariance.

    As in the reference, features are centred when they are whitened, but the covariance is computed
    without centring.

    Args:
      features: [N, D] of images outside the evaluation.
      power: components are divided by this power of their eigenvalue; 0.5 equalises the variances.
    Raises:
      UsageError: there are no images.
    """
    if len(features) == 0:
        raise UsageError("whitening needs at least one image to learn from, but got 0 images")
    features = np.asarray(features, np.float64)
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    values = np.maximum(values, SMALLEST * values.max())[::-1]
    return Whitening(features.mean(axis=0), vectors[:, ::-1] / values**power)
