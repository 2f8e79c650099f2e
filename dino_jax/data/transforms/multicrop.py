"""Multi-crop augmentation on the device: all global and local crops of a batch of uint8 canvases.

Each crop is first planned: the image's own key determines the box, the flip and the strength of
each colour operation. The plan is then carried out with PIL's rounding (see `resample`, `color`).
The order of the operations is the paper's: crop and resize, flip, jitter, grayscale, blur,
solarize, normalize. Images are independent, so a sharded batch needs no communication.

Dims: B images, S side of the canvas, C channels, N crops of one kind, H, W sides of global crops,
h, w sides of local crops, L local crops.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.data.transforms import color, resample
from dino_jax.errors import UsageError

_TRIES = 10  # random boxes tried before the central box is used
BOX_DRAWS = 2 * _TRIES + 2  # random numbers per box: areas, aspect ratios, position
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # [24, 4]


@dataclasses.dataclass(frozen=True)
class CropSettings:
    """The multi-crop settings; the defaults are the paper's.

    Sizes and radii are in pixels, scales are shares of the image's area. Probabilities are per
    crop: `blur_prob` for the first global, the second global and the local crops, and
    `solarize_prob` for the second global crop only. Brightness, contrast and saturation factors
    are uniform in `[max(0, 1 - x), 1 + x]`, hue shifts in `[-hue, hue]` turns. `mean` and `std`
    have C values each.

    Raises:
      UsageError: a value is out of range, or a tuple has the wrong length.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_size: int = 96
    local_number: int = 8
    local_scale: tuple[float, float] = (0.05, 0.4)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.2
    mean: tuple[float, ...] = color.IMAGENET_MEAN
    std: tuple[float, ...] = color.IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 pixel")
        _require(self.local_number >= 0, "local_number", self.local_number, "0 or more")
        for name in ("global_scale", "local_scale"):
            low, high = self._pair(name)
            _require(low > 0 and high <= 1, name, (low, high), "above 0 and at most 1")
        _require(self._pair("aspect_ratio")[0] > 0, "aspect_ratio", self.aspect_ratio, "above 0")
        _require(self._pair("blur_radius")[0] >= 0, "blur_radius", self.blur_radius, "0 or more")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "0 or more, and finite")
        _require(0 <= self.hue <= 0.5, "hue", self.hue, "between 0 and 0.5 turns")
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            _require(np.all((np.array(value) >= 0) & (np.array(value) <= 1)), name, value, "0 to 1")
        _require(len(self.blur_prob) == 3, "blur_prob", self.blur_prob, "three probabilities")
        paired = len(self.mean) == len(self.std) > 0
        _require(paired, "mean", self.mean, f"as long as std={self.std}: one value per channel")
        _require(np.all(np.isfinite(self.mean)), "mean", self.mean, "finite")
        positive = min(self.std) > 0 and np.all(np.isfinite(self.std))
        _require(positive, "std", self.std, "positive and finite")

    def _pair(self, name: str) -> tuple[float, float]:
        pair = getattr(self, name)
        ordered = len(pair) == 2 and pair[0] <= pair[1] < math.inf
        _require(ordered, name, pair, "two finite numbers (low, high)")
        return pair


class CropPlan(NamedTuple):
    """The random choices for N crops of one image."""

    box: jax.Array  # [N, 4] int32: top, left, height, width
    flip: jax.Array  # [N] bool
    order: jax.Array  # [N, 4] int32, see `color.jitter`
    factors: jax.Array  # [N, 4] float32, see `color.jitter`
    gray: jax.Array  # [N] bool
    blur_radius: jax.Array  # [N] float32, 0 for no blur
    solarize: jax.Array  # [N] bool


def augment(
    canvas: jax.Array, size: jax.Array, keys: jax.Array, settings: CropSettings
) -> tuple[jax.Array, jax.Array]:
    """Makes the global and local crops of a batch; an image's crops depend on its own key only.

    Args:
      canvas: [B, S, S, C] uint8, each image in the top left corner.
      size: [B, 2] int32, true height and width of each image.
      keys: [B] typed PRNG keys.
      settings: the multi-crop settings; static under `jax.jit`.

    Returns:
      [B, 2, H, W, C] and [B, L, h, w, C], float32, normalised.

    Raises:
      UsageError: `settings.mean` does not have one value for each channel.
    """
    channels = canvas.shape[-1]
    rule = f"one value per channel, and the images have {channels}"
    _require(len(settings.mean) == channels, "mean", settings.mean, rule)

    def one_image(canvas: jax.Array, size: jax.Array, key: jax.Array) -> list[jax.Array]:
        planes = jnp.moveaxis(canvas, -1, 0)
        sides = (settings.global_size, settings.local_size)
        plans = plan_crops(key, size, settings)
        return [
            carry_out(planes, plan, side, settings) for plan, side in zip(plans, sides, strict=True)
        ]

    global_views, local_views = jax.vmap(one_image)(canvas, size, keys)
    return global_views, local_views


def plan_crops(
    key: jax.Array, size: jax.Array, settings: CropSettings
) -> tuple[CropPlan, CropPlan]:
    """Plans one image's two global and L local crops.

    Args:
      key: [] typed PRNG key.
      size: [2] int32, height and width of the image.
      settings: the multi-crop settings.

    Returns: the plan of the global crops, N = 2, and of the local crops, N = L.
    """
    number = settings.local_number
    # A single draw, because each one is slow to compile.
    uniform = jax.random.uniform(key, (2 + number, BOX_DRAWS + 11))
    first, second, local = settings.blur_prob
    return (
        _plan(
            uniform[:2],
            size,
            settings,
            scale=settings.global_scale,
            blur_prob=np.array([first, second]),
            solarize_prob=np.array([0.0, settings.solarize_prob]),
        ),
        _plan(
            uniform[2:],
            size,
            settings,
            scale=settings.local_scale,
            blur_prob=np.full(number, local),
            solarize_prob=np.zeros(number),
        ),
    )


def sample_boxes(
    uniform: jax.Array,
    size: jax.Array,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
) -> jax.Array:
    """Turns random numbers into crop boxes, as torchvision's RandomResizedCrop does.

    The area is uniform, the aspect ratio log-uniform, and the sides are rounded. Of ten such boxes
    the first that fits is used, at a uniform position. If none fits, the box is the largest central
    one with an allowed aspect ratio.

    Args:
      uniform: [N, BOX_DRAWS] float32, random numbers in 0..1.
      size: [2] int32, height and width of the image.
      scale: smallest and largest share of the image's area.
      aspect_ratio: smallest and largest width / height.

    Returns: [N, 4] int32, (top, left, height, width).
    """
    height, width = size
    area = (height * width).astype(jnp.float32) * _between(scale, uniform[:, :_TRIES])
    low, high = aspect_ratio
    ratio = jnp.exp(_between((math.log(low), math.log(high)), uniform[:, _TRIES:-2]))
    tried = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=-1)))  # [N, tries, 2]
    fits = ((tried > 0) & (tried <= size.reshape(1, 1, 2))).all(axis=-1)  # [N, tries]
    chosen = jnp.take_along_axis(tried, jnp.argmax(fits, axis=1)[:, None, None], axis=1)[:, 0]
    central = jnp.stack(
        [jnp.minimum(height, jnp.round(width / low)), jnp.minimum(width, jnp.round(height * high))]
    )
    found = fits.any(axis=1, keepdims=True)  # [N, 1]
    sides = jnp.where(found, chosen, central[None]).astype(jnp.int32)
    room = size[None] - sides
    anywhere = jnp.floor(uniform[:, -2:] * (room + 1)).astype(jnp.int32)
    return jnp.concatenate([jnp.where(found, anywhere, room // 2), sides], axis=1)


def carry_out(planes: jax.Array, plan: CropPlan, side: int, settings: CropSettings) -> jax.Array:
    """Makes the planned crops of one image.

    Args:
      planes: [C, S, S] uint8, the image's canvas.
      plan: the plan of N crops.
      side: side of the crops, in pixels.
      settings: gives the largest blur radius, mean and std.

    Returns: [N, side, side, C] float32, normalised.
    """
    top, left, height, width = plan.box.T
    weights = functools.partial(resample.cubic_weights, inputs=planes.shape[-1], outputs=side)
    rows = jax.vmap(weights)(top, height)
    columns = jax.vmap(lambda *box, flip: weights(*box, flip=flip))(left, width, flip=plan.flip)
    crops = resample.resample(planes, rows, columns)  # [N, C, side, side]

    def recolor(crop: jax.Array, plan: CropPlan) -> jax.Array:
        crop = color.jitter(crop, plan.order, plan.factors)
        crop = jnp.where(plan.gray, color.grayscale(crop), crop)
        crop = color.gaussian_blur(crop, plan.blur_radius, settings.blur_radius[1])
        return jnp.where(plan.solarize, color.solarize(crop), crop)

    return color.normalize(jax.vmap(recolor)(crops, plan), settings.mean, settings.std)


def _plan(
    uniform: jax.Array,
    size: jax.Array,
    settings: CropSettings,
    *,
    scale: tuple[float, float],
    blur_prob: np.ndarray,
    solarize_prob: np.ndarray,
) -> CropPlan:
    """Plans one crop per row of `uniform` [N, BOX_DRAWS + 11]; the probabilities are [N]."""
    for_box, rest = uniform[:, :BOX_DRAWS], uniform[:, BOX_DRAWS:]
    flip, jitter, order, *strengths, gray, blur, radius, solarize = rest.T
    ranges = [
        (max(0.0, 1 - x), 1 + x)
        for x in (settings.brightness, settings.contrast, settings.saturation)
    ]
    ranges.append((-settings.hue, settings.hue))
    factors = jnp.stack([_between(*pair) for pair in zip(ranges, strengths, strict=True)], axis=1)
    unchanged = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    return CropPlan(
        box=sample_boxes(for_box, size, scale, settings.aspect_ratio),
        flip=flip < settings.flip_prob,
        order=jnp.asarray(_ORDERS)[(order * len(_ORDERS)).astype(jnp.int32)],
        factors=jnp.where((jitter < settings.jitter_prob)[:, None], factors, unchanged),
        gray=gray < settings.gray_prob,
        blur_radius=jnp.where(
            blur < blur_prob.astype(np.float32), _between(settings.blur_radius, radius), 0.0
        ),
        solarize=solarize < solarize_prob.astype(np.float32),
    )


def _between(bounds: tuple[float, float], uniform: jax.Array) -> jax.Array:
    low, high = bounds
    return low + (high - low) * uniform


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise UsageError(f"crops.{name}={value} must be {rule}")
