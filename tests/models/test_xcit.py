"""XCiT: the reference's numbers, and properties of its own."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import XCiT, create_model
from dino_jax.models.network import split
from dino_jax.models.xcit import fourier_positions
from tests.conftest import parity_cases
from tests.support.reference import (
    assert_forward_equals,
    call,
    image_keys,
    random_images,
    recipe_model,
)

CASES = parity_cases("forward_xcit*.npz")
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}

features = partial(call, XCiT.__call__)


def tiny(arch: str = "xcit_tiny_12_p16", **overrides: Any) -> XCiT:
    return recipe_model(arch, **TINY | overrides)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_forward_equals_the_reference(path: Path) -> None:
    assert_forward_equals(path, tolerance=2e-5)


def test_positions_are_sines_and_cosines_of_rows_then_columns() -> None:
    positions = np.asarray(fourier_positions((3, 5)))
    assert positions.shape == (3, 5, 64)
    for row, column, frequency in [(0, 0, 0), (2, 4, 3), (1, 2, 15), (2, 0, 9)]:
        for start, place, number in [(0, row, 3), (32, column, 5)]:
            angle = 2 * np.pi * (place + 1) / (number + 1e-6) / 10000 ** (2 * frequency / 32)
            found = positions[row, column, start + 2 * frequency :][:2]
            np.testing.assert_allclose(found, [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "size", "patches"),
    [
        ("xcit_tiny_12_p16", (1, 1), 1),
        ("xcit_tiny_12_p16", (20, 37), 2 * 3),  # rounded up
        ("xcit_tiny_12_p8", (20, 37), 3 * 5),
        ("xcit_nano_12_p8", (32, 16), 4 * 2),
    ],
)
def test_images_of_any_size(arch: str, size: tuple[int, int], patches: int) -> None:
    model, images = tiny(arch), random_images(2, *size, 3)
    found = features(model, images)
    assert (found.shape, found.dtype) == ((2, 32), np.float32)
    assert np.isfinite(found).all()
    attention = call(XCiT.get_last_selfattention, model, images)
    assert attention.shape == (2, 4, 1, 1 + patches)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)


def test_attention_weights_are_those_of_the_last_block() -> None:
    def both(model: XCiT, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, last = model.class_blocks
        tokens = last.norm1(first(model._tokens(images, None)))
        _, _, values = last.attn.queries_keys_values(tokens)
        mixed = model.get_last_selfattention(images) @ values
        mixed = mixed.swapaxes(1, 2).reshape(2, 1, 32)
        return last.attn.proj(mixed), last.attn(tokens, class_only=True)

    found, expected = call(both, tiny(), random_images(2, 32, 48, 3))
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Stochastic depth


def test_all_xca_blocks_have_the_same_drop_rate_and_class_attention_none() -> None:
    model = nnx.eval_shape(lambda: create_model("xcit_tiny_12_p16", drop_path_rate=0.2, **TINY))
    assert [block.drop_path_rate for block in model.blocks] == [0.2, 0.2]
    assert not any(hasattr(block, "drop_path_rate") for block in model.class_blocks)


def test_the_three_branches_are_dropped_independently() -> None:
    # One block, so one image has eight outcomes.
    model = tiny(depth=1, drop_path_rate=0.5)
    images = np.broadcast_to(random_images(1, 32, 32, 3), (200, 32, 32, 3))
    outcomes = features(model, images, image_keys(200))
    assert len(np.unique(outcomes.round(4), axis=0)) == 8


def test_drops_depend_on_the_images_own_key_only() -> None:
    model, images, keys = tiny(drop_path_rate=0.5), random_images(8, 32, 32, 3), image_keys(8)
    dropped, without = features(model, images, keys), features(model, images)
    assert (np.abs(dropped - without).max(1) > 1e-3).any()
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(
        features(model, images[order], keys[order]), dropped[order], atol=1e-5
    )
    np.testing.assert_array_equal(features(tiny(drop_path_rate=0.0), images, keys), without)


# Construction


@pytest.mark.parametrize(("arch", "scale"), [("xcit_small_12_p8", 1.0), ("xcit_small_24_p8", 1e-5)])
def test_initial_weights(arch: str, scale: float) -> None:
    make = jax.jit(lambda: split(create_model(arch, embed_dim=64, depth=1))[1:])
    params, stats = make()
    flat = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    weights = {".".join(str(p.key) for p in path): leaf for path, leaf in flat}
    for name, array in weights.items():
        *path, leaf = name.split(".")
        fan_in = array.shape[0] * array.shape[1] * array.shape[2] if array.ndim == 4 else None
        if leaf.startswith("gamma"):
            assert (array == np.float32(scale)).all(), name
        elif leaf in ("scale", "temperature"):
            assert (array == 1).all(), name
        elif fan_in:  # torch's default
            assert 0.8 * fan_in**-0.5 < np.abs(array).max() <= fan_in**-0.5, name
        elif leaf == "bias" and path[-1] in ("conv1", "conv2", "position_projection"):
            bound = (9 if "conv" in path[-1] else 64) ** -0.5
            assert 0.8 * bound < np.abs(array).max() <= bound, name
        elif leaf == "bias":
            assert not array.any(), name
        else:  # linear layers and the class token
            assert abs(array.std() / 0.02 - 1) < 0.25, name
    assert sum(array.ndim == 4 for array in weights.values()) == 3 + 2 + 1
    assert {float(array.mean()) for array in jax.tree.leaves(stats)} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "embed_dim=32 is not divisible by num_heads=5"),
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be a whole number of at least 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 must be at least 0 and below 1"),
        ({"patch_size": 4}, "patch_size=4 must be 8 or 16 for an XCiT"),
        ({"embed_dim": 36}, "embed_dim=36 must be a multiple of 8, half of patch_size=16"),
        ({"remat": "some"}, "remat='some' is unknown: choose one of none, dots, full"),
    ],
    ids=str,
)
def test_invalid_sizes_are_rejected(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        XCiT(rngs=nnx.Rngs(0), layer_scale=1.0, **{"patch_size": 16} | TINY | overrides)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (1, 0, 16, 3), (16, 16, 3), (0, 16, 16, 3)])
def test_images_of_the_wrong_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \[B, H, W, 3\] .* at least 1 \(one pixel\)"):
        tiny()(jnp.zeros(shape))
