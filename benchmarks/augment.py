"""How fast are the crops on the device, and how close to PIL's? Prints one JSON line.

python benchmarks/augment.py                               # about 20 s on a laptop's CPU
python benchmarks/augment.py --batch 64 --canvas 512       # one GPU's share of an ImageNet step

PIL makes the same crops, from the same plan, on one core.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from machine import report
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_jax.data.transforms import color
from dino_jax.data.transforms.multicrop import CropPlan, CropSettings, augment, plan_crops


def pil_crop(image: Image.Image, plan: CropPlan, n: int, side: int) -> Image.Image:
    """Makes crop `n` of a plan (NumPy arrays) with PIL, as the reference does."""
    top, left, height, width = plan.box[n].tolist()
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((side, side), Image.Resampling.BICUBIC)
    if plan.flip[n]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not np.array_equal(plan.factors[n], [1, 1, 1, 0]):
        crop = pil_jitter(crop, plan.order[n].tolist(), plan.factors[n].tolist())
    if plan.gray[n]:
        crop = crop.convert("L").convert(crop.mode)
    if plan.blur_radius[n]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(plan.blur_radius[n])))
    return ImageOps.solarize(crop) if plan.solarize[n] else crop


def pil_jitter(crop: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """Brightness, contrast, saturation and hue, by their numbers in `color`, in the given order."""
    enhancers = {
        color.BRIGHTNESS: ImageEnhance.Brightness,
        color.CONTRAST: ImageEnhance.Contrast,
        color.SATURATION: ImageEnhance.Color,
    }
    for operation in order:
        if operation in enhancers:
            crop = enhancers[operation](crop).enhance(factors[operation])
        elif crop.mode == "RGB":
            hue, saturation, value = crop.convert("HSV").split()
            steps = int(255 * factors[color.HUE]) % 256
            hue = Image.fromarray(np.asarray(hue) + np.uint8(steps))
            crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return crop


def pil_views(image: Image.Image, plan: CropPlan, side: int, settings: CropSettings) -> np.ndarray:
    """All planned crops of an image, normalised: [N, side, side, 3] float32."""
    crops = [np.asarray(pil_crop(image, plan, n, side)) for n in range(len(plan.flip))]
    mean, std = np.float32(settings.mean), np.float32(settings.std)
    return (np.stack(crops).astype(np.float32) / 255 - mean) / std


def draw_plans(keys: jax.Array, size: np.ndarray, settings: CropSettings) -> tuple[CropPlan, ...]:
    """Plans of the global and of the local crops.

    Args:
      keys: [B].
      size: [B, 2], heights and widths of the images.
      settings: of the crops.
    Returns: two plans with leaves [B, N, ...].
    """
    draw = jax.jit(jax.vmap(plan_crops, in_axes=(0, 0, None)), static_argnums=2)
    return jax.device_get(draw(keys, jnp.asarray(size), settings))


def median_seconds(work: Callable[[], object], budget: float) -> float:
    """Median time of `work`, repeated at least three times and for about `budget` seconds."""
    times = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images per call")
    parser.add_argument("--canvas", type=int, default=256, help="side of the canvases, pixels")
    parser.add_argument("--global-size", type=int, default=224, help="pixels; two crops per image")
    parser.add_argument("--local-size", type=int, default=96, help="pixels")
    parser.add_argument("--local-number", type=int, default=8, help="local crops per image")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each side")
    flags = parser.parse_args()
    settings = CropSettings(
        global_size=flags.global_size,
        local_size=flags.local_size,
        local_number=flags.local_number,
    )
    canvas = _pictures(flags.batch, flags.canvas)
    size = np.full((flags.batch, 2), flags.canvas, np.int32)
    keys = jax.random.split(jax.random.key(0), flags.batch)
    on_device = jax.device_put((canvas, size, keys))

    start = time.perf_counter()
    make = jax.jit(augment, static_argnums=3).lower(*on_device, settings).compile()
    compile_seconds = time.perf_counter() - start
    views = jax.block_until_ready(make(*on_device))
    device_seconds = median_seconds(lambda: jax.block_until_ready(make(*on_device)), flags.seconds)

    plans = draw_plans(keys, size, settings)
    sides = (flags.global_size, flags.local_size)
    few = min(flags.batch, 8)  # images per pass: PIL is slow, and its time is linear
    images = [Image.fromarray(pixels) for pixels in canvas[:few]]

    def with_pil() -> list[list[np.ndarray]]:
        return [
            [
                pil_views(image, CropPlan(*(leaf[i] for leaf in plan)), side, settings)
                for plan, side in zip(plans, sides, strict=True)
                if len(plan.flip[i])
            ]
            for i, image in enumerate(images)
        ]

    # Mostly the order of Pillow 13's passes (see `resample`), amplified by the hue.
    apart = np.concatenate(
        [
            np.abs((np.asarray(ours[i]) - theirs) * 255 * np.float32(settings.std)).ravel()
            for i, image in enumerate(with_pil())
            for ours, theirs in zip(views, image, strict=False)
        ]
    )
    pil_seconds = median_seconds(with_pil, flags.seconds)
    device_rate, pil_rate = flags.batch / device_seconds, few / pil_seconds
    result = {
        "device_images_per_s": round(device_rate, 1),
        "pil_images_per_s_one_core": round(pil_rate, 1),
        "ratio": round(device_rate / pil_rate, 2),
        "grey_levels_apart_mean": round(float(apart.mean()), 4),
        "grey_levels_apart_max": round(float(apart.max()), 1),
        "compile_s": round(compile_seconds, 1),
        **{name: value for name, value in vars(flags).items() if name != "seconds"},
    }
    report("augment", result)


def _pictures(number: int, side: int) -> np.ndarray:
    """Smooth colour fields with noise, [number, side, side, 3] uint8."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    fields = [Image.fromarray(field).resize((side, side)) for field in coarse]
    noise = random.normal(0, 8, (number, side, side, 3))
    return np.clip(np.stack(fields) + noise, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
