"""Components, colours and foreground; and the job."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dino_jax
from dino_jax import memory
from dino_jax.errors import UsageError
from dino_jax.jobs import pca as pca_job
from dino_jax.jobs.pca import pca
from dino_jax.models.network import split
from dino_jax.visualize.pca import is_foreground, principal_components, to_colors
from tests.support.reference import assert_full_precision


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_components_are_those_of_the_singular_values() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(200, 5)) * [5, 1, 3, 0.1, 0.5] + 7).astype(np.float32)
    centred = tokens - tokens.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    ours = principal_components(tokens, 3)
    np.testing.assert_allclose(np.abs(ours), np.abs((u * s)[:, :3]), atol=1e-3)
    np.testing.assert_allclose(ours.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(principal_components(tokens[::-1], 3)[::-1], ours, atol=1e-3)


def test_sign_is_that_of_the_largest_entry() -> None:
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


def test_foreground_is_the_side_with_less_of_the_border() -> None:
    rng = np.random.default_rng(0)
    inside = np.zeros((10, 10), bool)
    inside[3:8, 2:7] = True
    border = np.ones((10, 10), bool)
    border[1:-1, 1:-1] = False
    first = np.where(inside, 4.0, -1.0) + 0.5 * rng.normal(size=inside.shape)
    for sign in (1, -1):
        found = is_foreground(sign * first.ravel(), border.ravel())
        np.testing.assert_array_equal(found.reshape(10, 10), inside)


def test_one_token_or_equal_ones() -> None:
    for tokens in (np.ones((1, 4)), np.ones((6, 4))):
        components = principal_components(tokens, 3)
        assert is_foreground(components[:, 0], np.ones(len(tokens), bool)).all()


def test_job_shares_the_components(goldens: Path, tmp_path: Path) -> None:
    """The same picture twice, once at the side of another: the same colours."""
    picture = tmp_path / "photo.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(picture)
    output = tmp_path / "out"
    written = pca(
        str(goldens / "pth" / "backbone.pth"),
        (str(picture), "shapes:2@test", str(picture)),
        output,
        size=(48, 64),
    )
    names = ("photo", "picture_0", "picture_1", "photo_2")
    parts = [f"{name}-{part}.png" for name in names for part in ("pca", "foreground")]
    assert written == [output / "pca.png", *(output / part for part in parts)]
    for part in ("pca", "foreground"):
        first, again = (read(output / f"{name}-{part}.png") for name in ("photo", "photo_2"))
        assert first.shape == (48, 64, 3)
        np.testing.assert_array_equal(first, again)
        assert (first[::8, ::8] == first[7::8, 7::8]).all()  # a patch has one colour
        assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    parts = np.stack([read(output / f"{name}-foreground.png").sum(axis=-1) > 0 for name in names])
    assert 0.05 < parts.mean() < 0.95  # the photograph and the shapes are told apart


@pytest.mark.compiler
def test_tokens_are_computed_in_full_precision(goldens: Path) -> None:
    model, info = dino_jax.load(goldens / "pth" / "backbone.pth")
    graphdef, *arrays = split(model)
    image = jax.ShapeDtypeStruct((16, 24, 3), np.uint8)
    tokens = partial(pca_job._patch_tokens, graphdef, mean=info.mean, std=info.std)
    assert_full_precision(jax.jit(tokens).lower(arrays, image).as_text())


def test_tokens_that_are_not_finite_are_refused(goldens: Path, tmp_path: Path) -> None:
    weights = str(goldens / "pth" / "backbone.pth")
    with (
        mock.patch.object(pca_job, "normalize", lambda x, *_: jnp.moveaxis(x, -3, -1) * jnp.nan),
        pytest.raises(UsageError, match=r"picture_0: the patch tokens of .* not finite: the weig"),
    ):
        pca(weights, ("shapes:2@test",), tmp_path, size=(40, 56))


def test_job_needs_a_vit(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"linear.pth is of type Linear: patch tokens need a ViT"):
        pca(str(goldens / "pth" / "linear.pth"), ("shapes:2@test",), tmp_path)


def test_a_picture_that_memory_does_not_hold(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"picture_0: 56x40 pixels are 36 tokens, .*a smaller"):
        pca(str(goldens / "pth" / "backbone.pth"), ("shapes:1@test",), tmp_path, size=(40, 56))
