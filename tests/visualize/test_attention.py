"""Maps, masks and scores of attention."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import dino_jax
from dino_jax import create_model, sharding
from dino_jax.errors import UsageError
from dino_jax.models.network import split
from dino_jax.visualize.attention import (
    attention_function,
    attention_of,
    check_attends,
    jaccard,
    mass_mask,
    to_pixels,
)
from tests.conftest import parity_cases
from tests.support import runs
from tests.support.reference import assert_full_precision, call

CASES = parity_cases("attention_mask*.npz")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_masks_of_the_reference(path: Path) -> None:
    golden = np.load(path)
    mask = mass_mask(golden["attention"], float(golden["threshold"]))
    np.testing.assert_array_equal(mask, golden["mask"])


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95])
def test_mask_holds_the_mass_with_the_fewest_patches(threshold: float) -> None:
    maps = np.random.default_rng(0).exponential(size=(4, 5, 7)) ** 2
    for values, mask in zip(maps, mass_mask(maps, threshold), strict=True):
        kept = values[mask]
        assert kept.min() > values[~mask].max(initial=0)
        assert kept.sum() >= threshold * values.sum() > kept.sum() - kept.min()


@pytest.mark.parametrize("model_name", ["vit_tiny", "xcit_nano_12_p8"])
@pytest.mark.compiler
def test_maps_are_the_class_tokens_row(model_name: str) -> None:
    """On all eight devices, and with matmuls in full precision wherever it runs."""
    overrides: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    is_vit = model_name.startswith("vit")
    overrides |= {"patch_size": 8} if is_vit else {}
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 48, 3), np.uint8)
    mesh = sharding.make_mesh()
    with runs.quick_compilation():
        model = nnx.jit(lambda: create_model(model_name, **overrides))()
        graphdef, *weights = split(model)
        weights_everywhere = jax.device_put(weights, sharding.replicated(mesh))
        function = attention_function(graphdef, MEAN, STD, mesh)
        maps = function(*weights_everywhere, images)
        assert_full_precision(function.lower(*weights_everywhere, images).as_text())
        normalised = ((images / 255 - MEAN) / STD).astype(np.float32)
        expected = call(type(model).get_last_selfattention, model, normalised)[:, :, 0, 1:]
    assert maps.shape == (2, 2, 5, 6)
    np.testing.assert_allclose(maps.reshape(expected.shape), expected, atol=1e-5)


def test_refuses_a_network_without_attention() -> None:
    model = nnx.eval_shape(lambda: create_model("resnet18", rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="runs/r is a ResNet, which has no attention: it takes a"):
        check_attends(model, "runs/r")


def test_maps_that_are_not_finite_are_refused(goldens: Path) -> None:
    model, info = dino_jax.load(goldens / "pth" / "backbone.pth")
    nnx.update(model, jax.tree.map(lambda x: x * np.nan, nnx.state(model, nnx.Param)))
    with pytest.raises(UsageError, match=r"maps of .*backbone\.pth hold a value that is not fin"):
        attention_of(model, info)(np.zeros((16, 24, 3), np.uint8))


def test_pixels_get_their_patch() -> None:
    patches = np.arange(6).reshape(1, 2, 3)
    pixels = to_pixels(patches, 2, (3, 5))  # the last patches are cut
    expected = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    np.testing.assert_array_equal(pixels, [expected])


def test_jaccard_by_hand() -> None:
    truth = np.zeros((4, 4), bool)
    truth[:2] = True
    masks = np.stack([truth, ~truth, np.roll(truth, 1, axis=0), np.ones_like(truth)])
    np.testing.assert_allclose(jaccard(masks, truth), [1, 0, 4 / 12, 8 / 16])
    nothing = np.zeros_like(truth)
    assert jaccard(nothing, nothing) == 1.0
    assert jaccard(nothing, truth) == 0.0
