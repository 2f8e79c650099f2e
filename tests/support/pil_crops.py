"""Crops recoloured by PIL, which the transforms on the device are compared with."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_jax.data.transforms import color
from dino_jax.data.transforms.multicrop import CropPlan

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # factors that change nothing


def shift_hue(crop: Image.Image, shift: float) -> Image.Image:
    """Turns the hue by a share of the colour circle, in whole steps of 1/255."""
    hue, saturation, value = crop.convert("HSV").split()
    hue = hue.point(lambda level: (level + int(255 * shift)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


OPERATIONS = {
    color.BRIGHTNESS: lambda crop, factor: ImageEnhance.Brightness(crop).enhance(factor),
    color.CONTRAST: lambda crop, factor: ImageEnhance.Contrast(crop).enhance(factor),
    color.SATURATION: lambda crop, factor: ImageEnhance.Color(crop).enhance(factor),
    color.HUE: shift_hue,
}


def jitter(crop: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """Applies the operations in the given order.

    Args:
      crop: RGB.
      order: numbers of the operations, as in `color`.
      factors: by the number of the operation.
    """
    for number in order:
        crop = OPERATIONS[number](crop, factors[number])
    return crop


def recolor(crop: Image.Image, plan: CropPlan, n: int) -> Image.Image:
    """Applies everything that a plan (NumPy arrays) does to crop `n` after resizing it."""
    if plan.flip[n]:
        crop = ImageOps.mirror(crop)
    if not np.array_equal(plan.factors[n], NEUTRAL):  # PIL's conversion to HSV loses precision
        crop = jitter(crop, plan.order[n].tolist(), plan.factors[n].tolist())
    if plan.gray[n]:
        crop = crop.convert("L").convert("RGB")
    if plan.blur_radius[n]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(plan.blur_radius[n])))
    return ImageOps.solarize(crop) if plan.solarize[n] else crop
