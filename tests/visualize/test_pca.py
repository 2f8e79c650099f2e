"""Principal components, colours and foreground."""

import numpy as np

from dino_jax.visualize.pca import is_foreground, principal_components, to_colors


def test_components_equal_the_singular_vectors() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(200, 5)) * [5, 1, 3, 0.1, 0.5] + 7).astype(np.float32)
    centred = tokens - tokens.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    ours = principal_components(tokens, 3)
    np.testing.assert_allclose(np.abs(ours), np.abs((u * s)[:, :3]), atol=1e-3)
    np.testing.assert_allclose(ours.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(principal_components(tokens[::-1], 3)[::-1], ours, atol=1e-3)


def test_largest_entry_is_positive() -> None:
    tokens = np.outer(np.arange(10.0), [0.2, -0.9])
    assert (np.diff(principal_components(tokens, 1)[:, 0]) < 0).all()


def test_colors_ignore_a_few_outliers() -> None:
    components = np.repeat(np.linspace(-1, 1, 1000)[:, None], 3, axis=1)
    components[0, 1] = -1e6
    colors = to_colors(components)
    assert colors.dtype == np.uint8
    assert (np.diff(colors[2:].astype(int), axis=0) >= 0).all()
    assert np.abs(colors[500].astype(int) - 128).max() < 4
    assert (to_colors(np.zeros((4, 3))) == 0).all()


def test_foreground_is_the_side_with_less_border() -> None:
    rng = np.random.default_rng(0)
    inside = np.zeros((10, 10), bool)
    inside[3:8, 2:7] = True
    border = np.ones((10, 10), bool)
    border[1:-1, 1:-1] = False
    first = np.where(inside, 4.0, -1.0) + 0.5 * rng.normal(size=inside.shape)
    for sign in (1, -1):
        found = is_foreground(sign * first.ravel(), border.ravel())
        np.testing.assert_array_equal(found.reshape(10, 10), inside)


def test_one_token_or_equal_tokens() -> None:
    for tokens in (np.ones((1, 4)), np.ones((6, 4))):
        components = principal_components(tokens, 3)
        assert is_foreground(components[:, 0], np.ones(len(tokens), bool)).all()
