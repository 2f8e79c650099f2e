"""Colour operations against PIL: equal bit for bit, except the hue and ties of the blends."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_jax.data.transforms import color
from tests.conftest import GOLDENS, parity_cases
from tests.support import pil_augment

NAMES = ("brightness", "contrast", "saturation", "hue")  # in the order of `color`'s constants
jitter = jax.jit(color.jitter)
STAGES = {  # the operations after the jitter in the goldens' full chain
    "hflip": lambda crop: crop[..., ::-1],
    "gray": color.grayscale,
    "blur": lambda crop, radius: color.gaussian_blur(crop, radius, radius),
    "solarize": color.solarize,
}


def planes(pixels: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(pixels), -1, 0)


def pixels(planes: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(planes), 0, -1)


def apart(ours: jax.Array, theirs: np.ndarray | Image.Image) -> tuple[int, float]:
    """Maximum and mean difference in grey levels."""
    difference = np.abs(pixels(ours).astype(int) - np.asarray(theirs).astype(int))
    return difference.max(), difference.mean()


def factors_of(**changed: float) -> jax.Array:
    """Factors of `jitter`; operations that are not named have no effect."""
    neutral = dict(zip(NAMES, (1.0, 1.0, 1.0, 0.0), strict=True))
    return jnp.array(list((neutral | changed).values()), jnp.float32)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=parity_cases("augment*.npz"), ids=lambda p: p.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """A file of goldens; `own` is true for this repository's, which have measured bounds."""
    return dict(np.load(request.param)) | {"own": np.array(request.param.parent == GOLDENS)}


@pytest.mark.parametrize("name", NAMES)
def test_golden_jitter(recorded: dict[str, np.ndarray], name: str) -> None:
    """Measured: hue and brightness are equal; contrast and saturation differ by 1 in 1 % of values.

    There `base + factor * (value - base)` is an integer up to float32 rounding. A fused
    multiply-add rounds once and PIL twice, so truncation may give different integers.
    """
    values = json.loads(str(recorded["meta"]))["ops"][name]
    assert values
    for number, value in enumerate(values):
        ours = jitter(planes(recorded["small"]), jnp.arange(4), factors_of(**{name: value}))
        worst, mean = apart(ours, recorded[f"{name}{number}"])
        exact = recorded["own"] and name in ("hue", "brightness")
        assert worst <= (0 if exact else 1), value
        assert mean < (1e-3 if name in ("hue", "brightness") else 0.05), value


def test_golden_gray_and_solarize(recorded: dict[str, np.ndarray]) -> None:
    small = planes(recorded["small"])
    assert np.array_equal(pixels(color.grayscale(small)), recorded["gray"])
    assert np.array_equal(pixels(color.solarize(small)), recorded["solarize"])


def test_golden_blur(recorded: dict[str, np.ndarray]) -> None:
    radii = json.loads(str(recorded["meta"]))["blur_radii"]
    assert radii
    for number, radius in enumerate(radii):
        ours = color.gaussian_blur(planes(recorded["small"]), radius, max(radii))
        assert np.array_equal(pixels(ours), recorded[f"blur{number}"]), radius


def test_golden_chains(recorded: dict[str, np.ndarray]) -> None:
    """Measured: both are equal. A difference of one level may grow in the following operations."""
    meta = json.loads(str(recorded["meta"]))
    order = jnp.array([NAMES.index(name) for name, _ in meta["chain"]])
    crop = jitter(planes(recorded["small"]), order, factors_of(**dict(meta["chain"])))
    worst, mean = apart(crop, recorded["jitter_chain"])
    assert mean < (0.02 if recorded["own"] else 0.05)
    assert worst <= 2 or not recorded["own"]
    first, *stages = meta["full_chain"].split(", ")
    assert first == "jitter_chain"
    for stage in stages:
        name, *value = stage.split()
        crop = STAGES[name](crop, *map(float, value))
    worst, mean = apart(crop, recorded["full_chain"])
    assert mean < (0.02 if recorded["own"] else 0.05)
    assert worst <= 2 or not recorded["own"]


@pytest.mark.parametrize("kind", [color.BRIGHTNESS, color.CONTRAST, color.SATURATION])
def test_blends_against_pil(noise: np.ndarray, kind: int) -> None:
    """Measured: equal for random factors; another compiler may round ties differently."""
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
    blend = jax.jit(color.blend)
    for factor in np.random.default_rng(kind).uniform(0, 2, 20):
        theirs = enhance(Image.fromarray(noise)).enhance(float(factor))
        worst, mean = apart(blend(planes(noise), kind, factor), theirs)
        assert worst <= 1, factor
        assert mean < 0.01, factor


@pytest.mark.parametrize("kind", [color.BRIGHTNESS, color.CONTRAST, color.SATURATION])
def test_a_factor_of_one_changes_nothing(noise: np.ndarray, kind: int) -> None:
    assert np.array_equal(color.blend(planes(noise), kind, 1.0), planes(noise))


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.043, 0.0, 0.043, 0.1, 0.5])
def test_hue_of_the_colour_cube(shift: float) -> None:
    """Measured over all 2**24 colours: at most 1 level, in less than one in a million."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(86, -1, 3)
    ours = jax.jit(color.hue)(planes(cube), shift)
    theirs = pil_augment.jitter(Image.fromarray(cube), [color.HUE], [1, 1, 1, shift])
    worst, mean = apart(ours, theirs)
    assert worst <= 1
    assert mean < 1e-5


def test_gray_of_the_colour_cube() -> None:
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(86, -1, 3)
    assert (
        apart(color.grayscale(planes(cube)), Image.fromarray(cube).convert("L").convert("RGB"))[0]
        == 0
    )


def test_jitter_in_every_order(noise: np.ndarray) -> None:
    """Measured: equal in all 24 orders."""
    orders = np.array(list(itertools.permutations(range(4))))
    factors = factors_of(brightness=1.3, contrast=0.7, saturation=1.17, hue=-0.08)
    ours = jax.jit(jax.vmap(color.jitter, in_axes=(None, 0, None)))(planes(noise), orders, factors)
    results = set()
    for order, crop in zip(orders.tolist(), ours, strict=True):
        theirs = pil_augment.jitter(Image.fromarray(noise), order, factors.tolist())
        worst, mean = apart(crop, theirs)
        assert worst <= 1, order
        assert mean < 1e-3, order
        results.add(np.asarray(theirs).tobytes())
    assert len(results) == 24  # so a wrong order cannot pass


def test_neutral_jitter_changes_nothing(noise: np.ndarray) -> None:
    assert np.array_equal(jitter(planes(noise), jnp.arange(4), factors_of()), planes(noise))


def test_solarize(noise: np.ndarray) -> None:
    for threshold in (128, 40):
        theirs = ImageOps.solarize(Image.fromarray(noise), threshold)
        assert np.array_equal(pixels(color.solarize(planes(noise), threshold)), theirs)


@pytest.mark.parametrize("max_radius", [2.0, 5.0])
def test_blur_against_pil(noise: np.ndarray, max_radius: float) -> None:
    """Equal for every radius, because both use fixed point; also for ties (0.5, 1, 2) and 0."""
    blur = jax.jit(color.gaussian_blur, static_argnums=2)
    random = np.random.default_rng(0).uniform(0, max_radius, 20)
    for radius in (0.0, 0.1, 0.5, 1.0, max_radius, *np.float32(random).tolist()):
        theirs = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(radius))
        assert apart(blur(planes(noise), radius, max_radius), theirs)[0] == 0, radius


def test_blur_of_a_crop_smaller_than_the_kernel(noise: np.ndarray) -> None:
    tiny = noise[:2, :3]
    theirs = Image.fromarray(tiny).filter(ImageFilter.GaussianBlur(4.0))
    assert apart(color.gaussian_blur(planes(tiny), 4.0, 5.0), theirs)[0] == 0


def test_grey_images_have_no_colour(noise: np.ndarray) -> None:
    """One channel: brightness and contrast as in PIL's mode L, the rest has no effect."""
    grey = noise[..., :1]
    factors = factors_of(brightness=0.8, contrast=1.3, saturation=1.2, hue=0.1)
    ours = jitter(planes(grey), jnp.array([3, 1, 2, 0]), factors)
    theirs = ImageEnhance.Contrast(Image.fromarray(grey[..., 0])).enhance(float(factors[1]))
    theirs = ImageEnhance.Brightness(theirs).enhance(float(factors[0]))
    assert apart(ours, np.asarray(theirs)[..., None])[0] <= 1
    assert np.array_equal(color.grayscale(planes(grey)), planes(grey))


def test_other_channel_counts(noise: np.ndarray) -> None:
    """Five channels: colour operations have no effect, contrast uses the mean of all channels."""
    five = np.concatenate([noise, 255 - noise[..., :2]], axis=-1)
    same = jitter(planes(five), jnp.arange(4), factors_of(saturation=1.2, hue=0.1))
    assert np.array_equal(pixels(same), five)
    flat = jitter(planes(five), jnp.arange(4), factors_of(contrast=0.0))
    assert np.array_equal(np.unique(flat), [int(five.mean() + 0.5)])


def test_normalize(noise: np.ndarray) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = color.normalize(jnp.stack([planes(noise)] * 2), mean, std)
    assert ours.shape == (2, 60, 80, 3)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[1], (noise / 255 - mean) / std, atol=1e-6)
