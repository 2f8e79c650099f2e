"""Extracting the features of a source."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dino_jax import create_model, sharding
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source, open_source
from dino_jax.evaluate.features.square_pass import EvalTransform, feature_function, join, stream
from dino_jax.models.network import split

TRANSFORM = EvalTransform(resize=20, crop=16, canvas_size=24)
MODEL = create_model(
    "vit_tiny", patch_size=8, image_size=16, embed_dim=16, depth=1, num_heads=2, drop_path_rate=0.5
)


def features_of(
    source: Source, *, devices: int = 8, batch_size: int = 16, num_threads: int = 3
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    graphdef, params, batch_stats = split(MODEL)
    weights = jax.device_put((params, batch_stats), sharding.replicated(mesh))
    compiled = feature_function(graphdef, TRANSFORM, mesh)
    parts = list(
        stream(
            lambda batch: compiled(*weights, batch),
            Records(source, max_unreadable=1.0),
            TRANSFORM,
            batch_size=batch_size,
            num_threads=num_threads,
            mesh=mesh,
        )
    )
    features, labels, indices = join(parts)
    assert (labels == [source.label(i) for i in indices]).all()
    return features, indices, [len(part.index) for part in parts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pictures, larger and smaller than the canvas; two are unreadable."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(21):
        shape = (int(rng.integers(12, 60)), int(rng.integers(12, 60)), 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / f"{i:02}.png")
    for i in (3, 20):
        (root / f"{i:02}.png").write_text("no picture")
    return root


def by_hand(path: Path) -> np.ndarray:
    """The expected features: Pillow's resize and crop, then the model."""
    image = Image.open(path)
    size = tuple(int(TRANSFORM.resize * side / min(image.size)) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - TRANSFORM.crop) / 2) for side in image.size)
    image = image.crop((left, top, left + TRANSFORM.crop, top + TRANSFORM.crop))
    pixels = (np.asarray(image, np.float32) / 255 - TRANSFORM.mean) / TRANSFORM.std
    return np.asarray(MODEL(jnp.asarray(pixels, jnp.float32)[None])[0])


def test_every_readable_image_in_order(folder: Path) -> None:
    features, indices, batches = features_of(open_source(str(folder)))
    assert indices.tolist() == [i for i in range(21) if i not in (3, 20)]
    assert features.shape == (19, 16)
    assert features.dtype == np.float32
    assert batches == [15, 4]  # the readable images of a full and a partial batch
    for row, index in zip(features, indices, strict=True):
        # Pixels are rounded as by Pillow, but a single one may be rounded differently.
        np.testing.assert_allclose(row, by_hand(folder / f"{index:02}.png"), rtol=0, atol=2e-3)
    # The tolerance is meaningful: features of two images differ far more.
    assert np.abs(features[0] - features[1]).max() > 0.1


@pytest.mark.parametrize(
    ("devices", "batch_size", "num_threads"), [(1, 7, 1), (8, 3, 2), (8, 1000, 5)]
)
def test_features_do_not_depend_on_batches_and_devices(
    devices: int, batch_size: int, num_threads: int, folder: Path
) -> None:
    expected, indices, _ = features_of(open_source(str(folder)))
    features, same_indices, _ = features_of(
        open_source(str(folder)), devices=devices, batch_size=batch_size, num_threads=num_threads
    )
    np.testing.assert_array_equal(same_indices, indices)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
