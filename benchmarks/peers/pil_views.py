"""Random crops made with PIL only, drawn as the reference draws them."""

import math
import random

import numpy as np
from augment import pil_jitter
from PIL import Image, ImageFilter, ImageOps

from dino_jax.data.transforms import color
from dino_jax.data.transforms.multicrop import CropSettings


def views(canvas: np.ndarray, seed: int, settings: CropSettings) -> list[np.ndarray]:
    """All crops of an image [H, W, 3] uint8: [side, side, 3] float32, normalised, globals first."""
    draw, image = random.Random(seed), Image.fromarray(canvas)
    mean, std = np.float32(settings.mean), np.float32(settings.std)
    first, second, local = settings.blur_prob
    kinds = [(settings.global_size, settings.global_scale, first, 0.0)]
    kinds += [(settings.global_size, settings.global_scale, second, settings.solarize_prob)]
    kinds += [(settings.local_size, settings.local_scale, local, 0.0)] * settings.local_number
    crops = []
    for side, scale, blur_prob, solarize_prob in kinds:
        crop = _resized_crop(image, side, scale, draw)
        if draw.random() < 0.5:
            crop = ImageOps.mirror(crop)
        if draw.random() < settings.jitter_prob:
            crop = _jitter(crop, settings, draw)
        if draw.random() < settings.gray_prob:
            crop = crop.convert("L").convert("RGB")
        if draw.random() < blur_prob:
            crop = crop.filter(ImageFilter.GaussianBlur(draw.uniform(*settings.blur_radius)))
        if draw.random() < solarize_prob:
            crop = ImageOps.solarize(crop)
        crops.append((np.asarray(crop, np.float32) / 255 - mean) / std)
    return crops


def _resized_crop(
    image: Image.Image, side: int, scale: tuple[float, float], draw: random.Random
) -> Image.Image:
    """A crop of random area and aspect ratio; the whole image if ten draws do not fit."""
    box = (0, 0, *image.size)
    for _ in range(10):
        area = draw.uniform(*scale) * image.width * image.height
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = draw.randint(0, image.width - width)
            top = draw.randint(0, image.height - height)
            box = (left, top, left + width, top + height)
            break
    return image.crop(box).resize((side, side), Image.Resampling.BICUBIC)


def _jitter(crop: Image.Image, settings: CropSettings, draw: random.Random) -> Image.Image:
    factors = [0.0] * 4
    for operation, name in (
        (color.BRIGHTNESS, "brightness"),
        (color.CONTRAST, "contrast"),
        (color.SATURATION, "saturation"),
    ):
        most = getattr(settings, name)
        factors[operation] = draw.uniform(1 - most, 1 + most)
    factors[color.HUE] = draw.uniform(-settings.hue, settings.hue)
    return pil_jitter(crop, draw.sample(range(4), 4), factors)
