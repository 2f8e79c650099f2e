"""The pca job."""

import dataclasses
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dino_jax
from dino_jax import memory
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import backbone, picture_features
from dino_jax.jobs.pca import pca


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


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


def test_tokens_that_are_not_finite_are_refused(goldens: Path, tmp_path: Path) -> None:
    weights = str(goldens / "pth" / "backbone.pth")
    with (
        mock.patch.object(
            picture_features, "normalize", lambda x, *_: jnp.moveaxis(x, -3, -1) * jnp.nan
        ),
        pytest.raises(UsageError, match="features of shapes:2@test picture 0 contain a value that"),
    ):
        pca(weights, ("shapes:2@test",), tmp_path, size=(40, 56))


def test_job_needs_a_vit(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, info = dino_jax.load(goldens / "pth" / "backbone.pth")
    info = dataclasses.replace(info, arch="resnet18", patch_size=None)
    resnet = dino_jax.create_model("resnet18")
    monkeypatch.setattr(backbone, "load", lambda *_, **__: (resnet, info))
    with pytest.raises(UsageError, match=r"ResNet does not give the tokens .*: use a ViT"):
        pca("resnet", ("shapes:2@test",), tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"linear.pth is a linear classifier: give a backbone"):
        pca(str(goldens / "pth" / "linear.pth"), ("shapes:2@test",), tmp_path)


def test_a_picture_that_memory_does_not_hold(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"picture 0: 56x40 pixels are 36 tokens, .*a smaller"):
        pca(str(goldens / "pth" / "backbone.pth"), ("shapes:1@test",), tmp_path, size=(40, 56))
