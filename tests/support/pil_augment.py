"""The reference's augmentations in PIL, to compare with crops made on the device."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_jax.data.transforms import color
from dino_jax.data.transforms.multicrop import CropPlan

_ENHANCERS = {
    color.BRIGHTNESS: ImageEnhance.Brightness,
    color.CONTRAST: ImageEnhance.Contrast,
    color.SATURATION: ImageEnhance.Color,
}


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic resize to (width, height); resizes the width first in all versions of Pillow."""
    width, height = size
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def recolor(crop: Image.Image, plan: CropPlan, n: int) -> Image.Image:
    """Applies flip and colour operations of crop `n` in a plan of NumPy arrays."""
    if plan.flip[n]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not np.array_equal(plan.factors[n], [1, 1, 1, 0]):
        crop = jitter(crop, plan.order[n].tolist(), plan.factors[n].tolist())
    if plan.gray[n]:
        crop = crop.convert("L").convert(crop.mode)
    if plan.blur_radius[n]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(plan.blur_radius[n])))
    return ImageOps.solarize(crop) if plan.solarize[n] else crop


def jitter(crop: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """Jitters the colours of an RGB crop; arguments as in `color.jitter`."""
    for operation in order:
        if operation in _ENHANCERS:
            crop = _ENHANCERS[operation](crop).enhance(factors[operation])
        else:
            hue, saturation, value = crop.convert("HSV").split()
            steps = int(255 * factors[color.HUE]) % 256
            hue = Image.fromarray(np.asarray(hue) + np.uint8(steps))
            crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return crop
