"""Whole pictures at several scales: interpolation as in torch, and batches of several sizes."""

from functools import partial

import jax
import numpy as np
import pytest

from dino_jax import create_model
from dino_jax.evaluate.retrieval.scales import SCALES, AtScales, group_by_shape, network_shapes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
MODEL = create_model("vit_tiny", patch_size=8, image_size=32, embed_dim=16, depth=1, num_heads=2)
MODEL.eval()
features_of = jax.jit(lambda images: MODEL(images))


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def alone(picture: np.ndarray, scales: tuple[float, ...]) -> np.ndarray:
    """The mean of the features of one picture, scaled by torch."""
    torch = pytest.importorskip("torch")
    pixels = (picture / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    image = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    total = 0.0
    for scale in scales:
        scaled = torch.nn.functional.interpolate(
            image, scale_factor=scale, mode="bilinear", align_corners=False
        )
        total += np.asarray(features_of(scaled.numpy().transpose(0, 2, 3, 1)))[0]
    return total / len(scales)


@pytest.mark.parametrize(
    ("scales", "sizes", "groups_of"),
    [
        # 36x36 and 32x36 have as many patches as the position table, one of them a square picture.
        ((1.0,), [(32, 36), (36, 36), (43, 55), (32, 32), (40, 52)], 3),
        ((1.0, 2**-0.5, 1.25), [(40, 52), (41, 53), (52, 40)], 2),
    ],
)
def test_groups_give_the_same_as_single_pictures(
    scales: tuple[float, ...], sizes: list[tuple[int, int]], groups_of: int
) -> None:
    several = pictures(*sizes)
    groups = group_by_shape(dict(enumerate(sizes)), scales, 8, MEAN, STD)
    assert len(groups) == groups_of
    assert sorted(i for group in groups.values() for i in group.indices) == [*range(len(sizes))]
    for feature, (indices, canvas, _) in groups.items():
        batch = np.full((len(indices), *canvas, 3), 0, np.uint8)
        for place, i in zip(batch, indices, strict=True):
            place[: sizes[i][0], : sizes[i][1]] = several[i]
        size = np.array([sizes[i] for i in indices])
        rows = np.asarray(jax.jit(partial(feature, MODEL))(batch, size))
        for row, i in zip(rows, indices, strict=True):
            np.testing.assert_allclose(row, alone(several[i], scales), rtol=0, atol=2e-4)


def test_shapes_of_the_network_input() -> None:
    assert network_shapes((168, 224), (1.0,), 16) == ((160, 224),)
    assert network_shapes((168, 224), (1.0,), None) == ((168, 224),)
    assert network_shapes((150, 224), SCALES, 16)[1:] == ((96, 144), (64, 112))
    assert network_shapes((224, 224), (1.0,), 16) == ((224, 224),)
    # As many patches as a square picture has, but not square: one column more, of no patch.
    assert network_shapes((230, 224), (1.0,), 16) == ((224, 225),)


def test_largest_shapes_come_first() -> None:
    groups = group_by_shape({3: (16, 16), 5: (64, 32), 9: (20, 64)}, (1.0,), 8, MEAN, STD)
    assert [group.indices for group in groups.values()] == [[5], [9], [3]]
    assert [group.canvas for group in groups.values()] == [(64, 32), (20, 64), (16, 16)]
    assert all(isinstance(feature, AtScales) for feature in groups)
