"""`info.preprocess`: any images become the input that the evaluation jobs give a model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dino_jax
from dino_jax.data.sources import open_source
from dino_jax.data.transforms.color import IMAGENET_MEAN, IMAGENET_STD
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.tokens import ClassToken
from dino_jax.weights.info import WeightsInfo

COLOUR = WeightsInfo(
    arch="vit_tiny",
    patch_size=8,
    embed_dim=192,
    num_heads=3,
    num_registers=0,
    source="",
    sha256="",
    which="teacher",
    dtype="float32",
    resize=32,
    crop=24,
    canvas_size=64,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)


def expected(image: Image.Image) -> np.ndarray:
    """The transform of the reference, step by step."""
    width, height = image.size
    scale = 32 / min(image.size)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 24) / 2), round((image.height - 24) / 2)
    pixels = np.asarray(image.crop((left, top, left + 24, top + 24)), np.float32) / 255
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


def test_images_of_any_kind_and_size(photo: Image.Image) -> None:
    tall = photo.rotate(90, expand=True)
    array = np.asarray(photo)
    for images, count in (
        (photo, 1),
        (array, 1),
        (array / np.float32(255), 1),
        ([photo, tall, array], 3),
        (np.stack([array, array]), 2),
    ):
        pixels = COLOUR.preprocess(images)
        assert pixels.dtype == np.float32
        assert pixels.shape == (count, 24, 24, 3)
        np.testing.assert_allclose(pixels[0], expected(photo), atol=1e-5)
    np.testing.assert_allclose(COLOUR.preprocess([photo, tall])[1], expected(tall), atol=1e-5)


def test_grey_images_and_grey_models(photo: Image.Image) -> None:
    grey = photo.convert("L")
    of_colour_model = COLOUR.preprocess([grey, np.asarray(grey), np.asarray(grey)[..., None]])
    np.testing.assert_array_equal(of_colour_model, of_colour_model[:1].repeat(3, 0))
    model = WeightsInfo(**vars(COLOUR) | {"mean": (0.5,), "std": (0.25,)})
    assert model.preprocess(photo).shape == (1, 24, 24, 1)
    np.testing.assert_allclose(model.preprocess(photo), model.preprocess(grey))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image to preprocess"),
        ("cat.jpg", "'cat.jpg' is a path: open it first"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        (np.zeros((8, 8, 3), np.int32), "dtype int32"),
        (np.full((8, 8, 3), 255.0), r"values outside 0\.\.1"),
        (np.full((8, 8, 3), np.nan), r"values outside 0\.\.1"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
    ],
    ids=str,
)
def test_rejects(images: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        COLOUR.preprocess(images)


def test_features_are_those_of_the_jobs(weights: str, photo: Image.Image, tmp_path: Path) -> None:
    images = [photo, photo.rotate(90, expand=True), photo.resize((300, 250))]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    extractor = Extractor(weights, Extraction(resize=32, crop=32, num_threads=2))
    (side,) = extractor.features(ClassToken(), [open_source(str(tmp_path))])
    model, info = dino_jax.load(weights)
    pixels = dataclasses.replace(info, resize=32, crop=32).preprocess(images)
    np.testing.assert_allclose(model(pixels), side.features, atol=0.02)  # a grey level of rounding
    assert np.abs(side.features[0] - side.features[1]).max() > 0.5
