"""Generated pictures: reproducible and balanced."""

import numpy as np
import pytest

from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.shapes import SIDE, ShapesSource


def pictures(source: ShapesSource, number: int) -> np.ndarray:
    return np.stack([np.asarray(source.image(i)) for i in range(number)])


def test_a_picture_depends_on_split_and_index_alone() -> None:
    few, many, test = (open_source(f"shapes:{spec}") for spec in ("5@train", "50", "5@test"))
    assert many.spec == "shapes:50@train"
    np.testing.assert_array_equal(pictures(few, 5), pictures(many, 5))
    assert (pictures(few, 5) != pictures(test, 5)).any(axis=(1, 2, 3)).all()
    assert len(np.unique(pictures(many, 50).reshape(50, -1), axis=0)) == 50


def test_pictures_do_not_change_between_versions() -> None:
    """Scores of different versions compare only if this holds; a change belongs in CHANGELOG."""
    mean = pictures(open_source("shapes:20@train"), 20).mean(axis=(1, 2, 3))
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


def test_mask_is_where_the_shape_is() -> None:
    """Inside and outside of the mask the colours differ, in nearly every picture clearly."""
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
def test_outlines_fill_their_circle(name: str) -> None:
    source = open_source("shapes:200@train")
    label = source.class_names.index(name)
    extents = []
    for index in np.flatnonzero(source.labels == label):
        rows, columns = np.nonzero(source.mask(index))
        extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(extents) > 0.3 * SIDE
    assert max(extents) <= 0.95 * SIDE
