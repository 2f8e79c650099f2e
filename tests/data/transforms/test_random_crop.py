"""The linear classifier's random crops, compared with PIL."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dino_jax.data.transforms.multicrop import BOX_DRAWS, sample_boxes
from dino_jax.data.transforms.random_crop import random_crop

SIZE = (37, 50)  # height and width
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


def crops(keys: jax.Array, **settings: object) -> np.ndarray:
    canvas = np.zeros((len(keys), 64, 64, 3), np.uint8)
    canvas[:, : SIZE[0], : SIZE[1]] = IMAGE
    sizes = np.tile(np.int32(SIZE), (len(keys), 1))
    crop = partial(random_crop, side=24, mean=(0, 0, 0), std=(1, 1, 1), **settings)
    return np.asarray(jax.jit(crop)(canvas, sizes, keys))


def test_crops_equal_pils() -> None:
    keys = jax.random.split(jax.random.key(1), 12)
    found = crops(keys)
    flips = 0
    for key, crop in zip(keys, found, strict=True):
        draws = jax.random.uniform(key, (BOX_DRAWS + 1,))
        box = sample_boxes(draws[None, :-1], jnp.array(SIZE), (0.08, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = np.asarray(box)[0].tolist()
        image = Image.fromarray(IMAGE).crop((left, top, left + width, top + height))
        image = image.resize((24, 24), Image.Resampling.BILINEAR)
        if draws[-1] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            flips += 1
        levels = np.abs(crop * 255 - np.asarray(image, np.float32))
        assert levels.max() <= 1.01
        assert levels.mean() < 0.3  # Pillow 13 may resize the height first, see `resample`
    assert 0 < flips < 12


def test_boxes_are_drawn_from_the_whole_range() -> None:
    keys = jax.random.split(jax.random.key(2), 64)
    whole = crops(keys, scale=(1.0, 1.0), aspect_ratio=(50 / 37, 50 / 37), flip_prob=0.0)
    assert (whole == whole[:1]).all()  # only one box fits
    assert len(np.unique(crops(keys), axis=0)) == 64
