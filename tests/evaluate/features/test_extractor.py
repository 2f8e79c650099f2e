"""The jobs' feature extraction, with weights of the reference."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import extractor as extraction
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import BlockTokens, ClassToken, ClassTokens

OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=16, num_threads=2)
TRAIN, TEST = open_source("shapes:20@train"), open_source("shapes:9@test")


@pytest.fixture(scope="module")
def extractor(goldens: Path) -> Extractor:
    return Extractor(str(goldens / "pth/backbone.pth"), OPTIONS)


def test_features_equal_those_of_the_model(extractor: Extractor) -> None:
    train, test = extractor.features(ClassToken(), [TRAIN, TEST])
    assert train.features.shape == (20, 48)
    assert test.index.tolist() == list(range(9))
    # The class token after the norm, computed with other methods of the model.
    (tokens,) = extractor.features(BlockTokens(), [TEST])
    np.testing.assert_allclose(tokens.features, test.features, atol=1e-4)
    assert extractor.unreadable == {TRAIN.spec: 0, TEST.spec: 0}


def test_second_job_computes_nothing(extractor: Extractor, tmp_path: Path) -> None:
    save, load = FeatureCache(save_features=tmp_path), FeatureCache(load_features=tmp_path)
    with pytest.raises(UsageError, match="has no features of shapes:9@test, only of nothing"):
        extractor.features(ClassToken(), [TEST], load)
    (first,) = extractor.features(ClassToken(), [TEST], save)
    with mock.patch.object(extraction, "stream", side_effect=AssertionError("computed")):
        for cache in (save, load):
            (again,) = extractor.features(ClassToken(), [TEST], cache)
            np.testing.assert_array_equal(again.features, first.features)
        with pytest.raises(UsageError, match=r"feature ClassToken.* instead of ClassTokens"):
            extractor.features(ClassTokens(2), [TEST], load)


def test_rejects_an_unwritable_folder_before_extraction(
    extractor: Extractor, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with (
        mock.patch.object(extraction, "stream", side_effect=AssertionError("computed")),
        pytest.raises(UsageError, match=r"save_features: folder .*file cannot be written"),
    ):
        extractor.features(ClassToken(), [TEST], FeatureCache(save_features=tmp_path / "file"))


def test_rejects_features_of_other_weights(
    extractor: Extractor, goldens: Path, tmp_path: Path
) -> None:
    extractor.features(ClassToken(), [TEST], FeatureCache(save_features=tmp_path))
    student = Extractor(
        str(goldens / "pth/full_checkpoint.pth"),
        Extraction(which="student", resize=16, crop=16, canvas_size=32),
    )
    with pytest.raises(UsageError, match=r"weights [0-9a-f]{12}\.\.\. instead of [0-9a-f]{12}"):
        student.features(ClassToken(), [TEST], FeatureCache(load_features=tmp_path))


def test_bfloat16_is_close(extractor: Extractor, goldens: Path) -> None:
    options = Extraction(dtype="bfloat16", resize=16, crop=16, canvas_size=32, batch_size=16)
    rough = Extractor(str(goldens / "pth/backbone.pth"), options)
    assert rough.info.dtype == "bfloat16"
    (exact,), (near,) = (e.features(ClassToken(), [TEST]) for e in (extractor, rough))
    assert near.features.dtype == np.float32
    assert 0 < np.abs(near.features - exact.features).max() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"crop": 8}, "crop=16.* instead of .*crop=8"), ({"dtype": "bfloat16"}, "dtype float32 inst")],
)
def test_rejects_features_of_another_transform_or_dtype(
    change: dict[str, Any], message: str, extractor: Extractor, goldens: Path, tmp_path: Path
) -> None:
    extractor.features(ClassToken(), [TEST], FeatureCache(save_features=tmp_path))
    other = Extractor(str(goldens / "pth/backbone.pth"), dataclasses.replace(OPTIONS, **change))
    with pytest.raises(UsageError, match=message):
        other.features(ClassToken(), [TEST], FeatureCache(load_features=tmp_path))


def test_rejects_features_that_are_not_finite(extractor: Extractor) -> None:
    """Extraction checks this for every job. Here the fifth image's token is NaN."""

    @dataclasses.dataclass(frozen=True)
    class Broken:
        def __call__(self, model: nnx.Module, images: jax.Array) -> jax.Array:
            is_fifth = jnp.arange(len(images)) == 4
            return jnp.where(is_fifth[:, None], jnp.nan, model(images))

    with pytest.raises(
        UsageError, match="features of shapes:9@test picture 4 contain a value that"
    ):
        list(extractor.stream(Broken(), TEST))


def test_compiles_for_one_shape(goldens: Path) -> None:
    """Independent of the size of the last batch, and shared with larger sources."""
    few = Extractor(str(goldens / "pth/backbone.pth"), dataclasses.replace(OPTIONS, batch_size=8))
    few.features(ClassToken(), [TRAIN, TEST])
    (compiled,) = few._compiled.values()
    assert compiled._cache_size() == 1


def test_unreadable_images_are_counted(extractor: Extractor, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("no picture")
    source = open_source(str(tmp_path))
    store = tmp_path / "store"
    for _ in range(2):  # first computed, then cached
        (found,) = extractor.features(ClassToken(), [source], FeatureCache(save_features=store))
        assert found.index.tolist() == [0, 2]
        assert extractor.unreadable.pop(source.spec) == 1


def test_rejects_invalid_arguments(extractor: Extractor, goldens: Path) -> None:
    with pytest.raises(UsageError, match="is a linear classifier: give a backbone"):
        Extractor(str(goldens / "pth/linear.pth"), OPTIONS)
    with pytest.raises(UsageError, match="crop=32 must not be larger than resize=16"):
        Extractor(str(goldens / "pth/backbone.pth"), Extraction(resize=16, crop=32))
    with pytest.raises(UsageError, match="n=99 must be between 1 and the depth"):
        extractor.features(ClassTokens(99), [TEST])
