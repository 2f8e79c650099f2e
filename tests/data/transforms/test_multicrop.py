"""Multi-crop: the pixels equal PIL's, and depend on the image's own key only."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from dino_jax.data.transforms.multicrop import CropPlan, CropSettings, augment
from dino_jax.errors import UsageError
from dino_jax.sharding import batch_sharded, make_mesh
from tests.support import pil_augment
from tests.support.collectives import moved
from tests.support.crop_plans import SMALL, plan

BATCH, SIDE = 16, 64


@pytest.fixture(scope="module")
def batch(goldens: Path) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Crops of a photograph, of many sizes, on canvases of noise."""
    photo = np.load(goldens / "augment.npz")["image"]
    source = np.random.default_rng(0)
    size = source.integers(20, SIDE + 1, (BATCH, 2), dtype=np.int32)
    canvas = source.integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    for i, (height, width) in enumerate(size):
        canvas[i, :height, :width] = photo[8 * i : 8 * i + height, 9 * i : 9 * i + width]
    return canvas, size, jax.random.split(jax.random.key(7), BATCH)


@pytest.fixture(scope="module")
def compiled(batch: tuple) -> jax.stages.Compiled:
    """`augment` for eight devices with two images each."""
    sharded = jax.device_put(batch, batch_sharded(make_mesh()))
    return jax.jit(augment, static_argnums=3).lower(*sharded, SMALL).compile()


@pytest.fixture(scope="module")
def views(batch: tuple, compiled: jax.stages.Compiled) -> tuple[np.ndarray, np.ndarray]:
    return run(compiled, *batch)


def run(compiled: jax.stages.Compiled, *batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(compiled(*jax.device_put(batch, compiled.input_shardings[0])))


def test_pixels_against_pil(batch: tuple, views: tuple[np.ndarray, np.ndarray]) -> None:
    """Every crop of the batch, compared with PIL's crop from the same plan.

    Measured: 1 of 1e4 values differs, by one level. The maximum may be larger: the hue can turn a
    difference of one level from the resampling (see test_resample) into several.
    """
    canvas, size, keys = batch
    plans = jax.device_get(plan(keys, size, SMALL))
    apart = []
    for crops, plans_, side in zip(views, plans, (32, 16), strict=True):
        grey_levels = (crops * np.float32(SMALL.std) + np.float32(SMALL.mean)) * 255
        for i, n in np.ndindex(crops.shape[:2]):
            one = CropPlan(*(leaf[i] for leaf in plans_))
            top, left, height, width = one.box[n].tolist()
            image = Image.fromarray(canvas[i, : size[i, 0], : size[i, 1]])
            image = image.crop((left, top, left + width, top + height))
            image = pil_augment.resize(image, (side, side))
            theirs = np.asarray(pil_augment.recolor(image, one, n))
            apart.append(np.abs(grey_levels[i, n] - theirs).ravel())
    apart = np.concatenate(apart)
    assert apart.max() < 6
    assert (apart > 0.5).mean() < 1e-3


def test_crops_depend_on_the_key_only(
    batch: tuple, views: tuple, compiled: jax.stages.Compiled
) -> None:
    """On another device, with other neighbours and padding, they are equal bit for bit."""
    canvas, size, keys = batch
    order = np.random.default_rng(0).permutation(BATCH)
    elsewhere = canvas.copy()
    for i, (height, width) in enumerate(size):
        elsewhere[i, height:], elsewhere[i, :, width:] = 0, 0
    moved = run(compiled, elsewhere[order], size[order], keys[order])
    for before, after in zip(views, moved, strict=True):
        assert np.array_equal(before[order], after)


def test_another_key_gives_other_crops(batch: tuple, compiled: jax.stages.Compiled) -> None:
    canvas, size, keys = batch
    same = [np.repeat(leaf[:1], BATCH, axis=0) for leaf in (canvas, size)]
    for crops in run(compiled, *same, keys):
        crops = crops.reshape(-1, *crops.shape[2:])
        assert len(np.unique(crops, axis=0)) == len(crops)


@pytest.mark.compiler
def test_a_sharded_batch_needs_no_communication(compiled: jax.stages.Compiled) -> None:
    assert not moved(compiled.as_text())
    for sharding in compiled.output_shardings:
        assert sharding.spec == PartitionSpec("data")


def test_grey_images_without_local_crops(batch: tuple) -> None:
    """One channel, and an empty array where there are no local crops."""
    canvas, size, keys = batch
    settings = CropSettings(global_size=20, local_size=12, local_number=0, mean=(0.5,), std=(0.5,))
    global_views, local_views = jax.jit(augment, static_argnums=3)(
        canvas[..., :1], size, keys, settings
    )
    assert global_views.shape == (BATCH, 2, 20, 20, 1)
    assert global_views.dtype == jnp.float32
    assert local_views.shape == (BATCH, 0, 12, 12, 1)
    assert -1 <= global_views.min() < -0.5 < 0.5 < global_views.max() <= 1


def test_shapes(views: tuple[np.ndarray, np.ndarray]) -> None:
    assert views[0].shape == (BATCH, 2, 32, 32, 3)
    assert views[1].shape == (BATCH, 3, 16, 16, 3)
    assert {crops.dtype for crops in views} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "setting",
    [
        {"global_size": 0},
        {"local_size": -96},
        {"local_number": -1},
        {"global_scale": (0.0, 1.0)},
        {"global_scale": (0.8, 0.4)},
        {"local_scale": (0.05, 1.5)},
        {"local_scale": (0.05,)},
        {"aspect_ratio": (0.0, 1.0)},
        {"blur_radius": (-1.0, 2.0)},
        {"brightness": -0.1},
        {"brightness": math.inf},
        {"contrast": math.nan},
        {"aspect_ratio": (0.75, math.inf)},
        {"blur_radius": (0.1, math.inf)},
        {"mean": (0.5, math.nan, 0.5)},
        {"std": (0.2, math.inf, 0.2)},
        {"hue": 0.6},
        {"flip_prob": 1.5},
        {"blur_prob": (1.0, -0.1, 0.5)},
        {"blur_prob": (1.0, 0.5)},
        {"mean": (0.5,)},
        {"mean": ()},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_invalid_settings_are_rejected(setting: dict) -> None:
    """The message gives the key and the value."""
    ((name, value),) = setting.items()
    with pytest.raises(UsageError, match=re.escape(f"crops.{name}={value}")):
        CropSettings(**setting)


def test_mean_must_fit_the_channels(batch: tuple) -> None:
    canvas, size, keys = batch
    with pytest.raises(UsageError, match="one value per channel, and the images have 1"):
        augment(canvas[..., :1], size, keys, SMALL)
