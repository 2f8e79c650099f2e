"""PCA whitening, compared with recorded results and its mathematical properties."""

from pathlib import Path

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.evaluate.retrieval.whitening import learn_whitening
from tests.conftest import parity_cases


@pytest.mark.parametrize("path", parity_cases("whitening*.npz"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    # The recorded features are whitened without centering them here.
    whitened = golden["x"] @ learn_whitening(golden["train"]).matrix
    np.testing.assert_allclose(np.abs(whitened), golden["y_abs"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(whitened @ whitened.T, golden["gram"], rtol=0, atol=1e-8)


def test_whitened_features_have_equal_variances() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((500, 6)) * [5, 1, 1, 0.2, 3, 1]
    features -= features.mean(axis=0)
    whitened = learn_whitening(features).apply(features)
    np.testing.assert_allclose(whitened.T @ whitened / 500, np.eye(6), atol=1e-9)
    half = learn_whitening(features, power=0.25).apply(features)
    spread = (half**2).mean(axis=0)
    np.testing.assert_allclose(spread**2, np.sort((features**2).mean(axis=0))[::-1], rtol=0.2)


def test_subtracts_the_mean() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 4)) + 3
    whitening = learn_whitening(features)
    np.testing.assert_allclose(whitening.apply(features.mean(axis=0)), 0, atol=1e-12)


def test_directions_without_variance_stay_finite() -> None:
    features = np.outer(np.arange(1, 9), [1.0, 2.0, -1.0])
    assert np.isfinite(learn_whitening(features).apply(features)).all()
    with pytest.raises(UsageError, match="0 images"):
        learn_whitening(np.empty((0, 3)))
