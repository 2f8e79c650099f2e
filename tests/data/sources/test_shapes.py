"""Generated images of shapes: reproducible and balanced."""

import numpy as np
import pytest

from dino_jax.data.sources import open_source
from dino_jax.data.sources.shapes import SIDE, ShapesSource


def images(source: ShapesSource, number: int) -> np.ndarray:
    return np.stack([np.asarray(source.image(i)) for i in range(number)])


def test_an_image_depends_on_split_and_index_only() -> None:
    few, many, test = (open_source(f"shapes:{spec}") for spec in ("5@train", "50", "5@test"))
    assert many.spec == "shapes:50@train"
    np.testing.assert_array_equal(images(few, 5), images(many, 5))
    assert (images(few, 5) != images(test, 5)).any(axis=(1, 2, 3)).all()
    assert len(np.unique(images(many, 50).reshape(50, -1), axis=0)) == 50


def test_the_images_do_not_change_between_versions() -> None:
    """Otherwise scores of different versions are not comparable; record a change in CHANGELOG."""
    mean = images(open_source("shapes:20@train"), 20).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(mean[[0, 7, 19]], [112.0, 62.7, 89.6], atol=0.5)


def test_format_and_balance() -> None:
    source = open_source("shapes:95@val")
    image = source.image(0)
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
    assert source.labels.dtype == np.int32
    counts = np.bincount(source.labels)
    assert len(counts) == len(source.class_names) == 10
    assert counts.max() - counts.min() <= 1
    assert [source.label(i) for i in range(95)] == source.labels.tolist()


def test_the_mask_marks_the_shape() -> None:
    """The mean colours inside and outside of the mask differ, in nearly all images clearly."""
    source = open_source("shapes:200@train")
    gaps = []
    for index in range(200):
        mask, pixels = source.mask(index), np.asarray(source.image(index)).astype(float)
        assert mask.shape == (SIDE, SIDE)
        assert mask.dtype == bool
        assert 0.03 < mask.mean() < 0.7
        gaps.append(np.abs(pixels[mask].mean(axis=0) - pixels[~mask].mean(axis=0)).max())
    assert np.quantile(gaps, 0.05) > 25


@pytest.mark.parametrize("name", ShapesSource.class_names)
def test_shapes_fill_their_circle(name: str) -> None:
    source = open_source("shapes:200@train")
    label = source.class_names.index(name)
    extents = []
    for index in np.flatnonzero(source.labels == label):
        rows, columns = np.nonzero(source.mask(index))
        extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(extents) > 0.3 * SIDE
    assert max(extents) <= 0.95 * SIDE
