"""The Vision Transformer: the reference's numbers, and properties of its own.

Dims: B images, N tokens (class token first), D width, h heads.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import VisionTransformer, create_model
from dino_jax.models.network import abstract, split
from dino_jax.models.vit import resize_pos_embed
from tests.conftest import parity_cases
from tests.support.reference import call, random_images, recipe_images, recipe_model, traced
from tests.support.tiny_vit import TINY, features, tiny

PyTree = Any
CASES = parity_cases("forward_vit*.npz")
# The goldens' README allows 1e-4; measured are 4e-6.
TOLERANCE = 2e-5


# The reference's numbers


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_forward_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    arch, patch, size = meta["arch"], meta["patch"], tuple(meta["size"])
    model = recipe_model(arch, meta["seed"], patch_size=patch)
    assert sum(p.size for p in jax.tree.leaves(split(model)[1])) == meta["params"]
    images = recipe_images(f"{meta['seed']}/{arch}{patch}/{size}", (2, 3, *size))

    def everything(model: VisionTransformer, images: jax.Array) -> dict[str, jax.Array]:
        intermediate = model.get_intermediate_layers(images, n=4)
        table = model.pos_embed[...]
        grid = size[0] // patch, size[1] // patch
        if math.prod(grid) != table.shape[1] - 1 or size[0] != size[1]:
            table = resize_pos_embed(table, grid)
        return {
            "cls": model(images),
            "last_cls_attention": model.get_last_selfattention(images)[:, :, 0],
            "intermediate_cls": jnp.stack([tokens[:, 0] for tokens in intermediate]),
            "patch_mean": intermediate[-1][:, 1:].mean(1),
            "pos_embed": table[0, :, :8],
        }

    with jax.default_matmul_precision("highest"):
        found = call(everything, model, images)
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], rtol=0, atol=TOLERANCE, err_msg=name)


# Any image


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((4, 20), (4, 20)),  # a single row of patches
        ((18, 18), (16, 16)),  # not a multiple of the patch size, but the grid of the table
        ((19, 25), (16, 24)),
    ],
)
def test_incomplete_patches_are_cut_at_right_and_bottom(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    model, images = tiny(depth=1), random_images(2, *size, 3)
    whole = features(model, images)
    assert whole.shape == (2, 32)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(whole, features(model, images[:, : seen[0], : seen[1]]))
    images[:, seen[0] - 1, seen[1] - 1] += 1  # the last pixel that has an effect
    assert np.abs(features(model, images) - whole).max() > 1e-3


@pytest.mark.parametrize(("size", "grid"), [((17, 19), (4, 4)), ((8, 32), (2, 8))])
def test_the_table_is_resized_for_images_that_are_not_square(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    # As in the reference, even if the image has as many patches as the table.
    rows, columns = grid
    model, images = tiny(depth=1), random_images(1, *size, 3)
    found = features(model, images)
    cut = images[0, : 4 * rows, : 4 * columns].reshape(rows, 4, columns, 4, 3)
    patches = cut.swapaxes(1, 2).reshape(4, 4, 4, 4, 3)  # the same sixteen patches, 4 x 4
    square = patches.swapaxes(1, 2).reshape(1, 16, 16, 3)
    assert np.abs(found - features(model, square)).max() > 1e-2
    graphdef, params, _ = split(model)
    params["pos_embed"] = resize_pos_embed(params["pos_embed"], grid)
    expected = features(nnx.merge(graphdef, params, {}), square)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ({"in_channels": 1}, (2, 16, 16, 1)),
        ({"in_channels": 4, "patch_size": 8, "image_size": 32}, (2, 32, 32, 4)),
        ({"patch_size": 1, "image_size": 5, "mlp_ratio": 2.0}, (2, 3, 5, 3)),
        ({"patch_size": 14, "image_size": 28, "depth": 1}, (2, 28, 28, 3)),
    ],
    ids=str,
)
def test_overrides_set_the_shapes(overrides: dict[str, Any], shape: tuple[int, ...]) -> None:
    settings = TINY | overrides
    patch, side = settings["patch_size"], settings["image_size"]
    model = nnx.eval_shape(lambda: VisionTransformer(rngs=nnx.Rngs(0), **settings))
    assert model.pos_embed.shape == (1, 1 + (side // patch) ** 2, 32)
    assert model.patch_embed.kernel.shape == (patch * patch * shape[-1], 32)
    assert model.blocks[0].mlp.fc1.kernel.shape == (32, 32 * settings.get("mlp_ratio", 4))
    assert len(model.blocks) == settings["depth"]

    def outputs(model: VisionTransformer, images: jax.Array) -> list[jax.Array]:
        return [model(images), *model.get_intermediate_layers(images)]

    graphdef, params, _ = split(model)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.eval_shape(partial(traced, outputs, graphdef), params, {}, images)
    tokens = 1 + (shape[1] // patch) * (shape[2] // patch)
    assert [x.shape for x in found] == [(shape[0], 32), (shape[0], tokens, 32)]


def test_the_patch_embedding_equals_a_convolution() -> None:
    model, images = tiny(), random_images(2, 8, 12, 3)
    kernel, bias = model.patch_embed.kernel[...], model.patch_embed.bias[...]
    patches = jax.lax.conv_general_dilated(
        images,
        kernel.reshape(4, 4, 3, 32),
        window_strides=(4, 4),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(2, 6, 32)
    model = nnx.clone(model)
    model.blocks = nnx.List([lambda tokens, _: tokens])  # the identity instead of blocks
    model.norm = lambda tokens: tokens
    (tokens,) = model.get_intermediate_layers(jnp.asarray(images))
    positions = resize_pos_embed(model.pos_embed[...], (2, 3))
    np.testing.assert_allclose(tokens[:, 1:], patches + bias + positions[:, 1:], atol=1e-5)
    first = np.broadcast_to(model.cls_token[...] + positions[:, :1], (2, 1, 32))
    np.testing.assert_allclose(tokens[:, :1], first, atol=1e-6)


# Cost and precision


def flops(function: Callable, *args: PyTree) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


@pytest.mark.compiler
def test_the_last_block_for_the_class_token_only_is_exact_and_cheaper() -> None:
    model, images = tiny(), random_images(3, 16, 16, 3)
    graphdef, params, _ = split(model)

    def last_layer(model: VisionTransformer, images: jax.Array) -> jax.Array:
        return model.get_intermediate_layers(images, n=1)[0][:, 0]

    expected = call(last_layer, model, images)
    np.testing.assert_allclose(features(model, images), expected, atol=1e-5)
    class_only, whole = (
        flops(partial(traced, method, graphdef), params, {}, images)
        for method in (VisionTransformer.__call__, last_layer)
    )
    assert class_only < 0.8 * whole  # of a model with two blocks


def test_bfloat16_computes_in_half_and_returns_float32() -> None:
    def everything(model: VisionTransformer, images: jax.Array) -> list[jax.Array]:
        tokens = model.get_intermediate_layers(images)[0]
        return [model(images), tokens, model.get_last_selfattention(images)]

    images, half = random_images(4, 16, 16, 3), tiny(dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(split(half)[1])} == {jnp.dtype("float32")}
    found, expected = call(everything, half, images), call(everything, tiny(), images)
    for half, full in zip(found, expected, strict=True):
        assert half.dtype == np.float32
        assert 1e-5 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.03  # 8 bits


# Construction


def initial_weights(rngs: nnx.Rngs | None) -> dict[str, np.ndarray]:
    model = create_model("vit_tiny", rngs=rngs, **TINY | {"embed_dim": 64, "depth": 1})
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(split(model)[1]))
    return {".".join(str(p.key) for p in path): leaf for path, leaf in flat}


def test_initial_weights() -> None:
    weights = initial_weights(None)
    for name, array in weights.items():
        if name.startswith("patch_embed"):
            bound = 1 / np.sqrt(4 * 4 * 3)
            assert 0.9 * bound < np.abs(array).max() <= bound, name
            assert abs(array.std() / (bound / np.sqrt(3)) - 1) < 0.2, name
        elif name.endswith("bias"):
            assert not array.any(), name
        elif name.endswith("scale"):
            assert (array == 1).all(), name
        else:
            assert abs(array.std() / 0.02 - 1) < 0.2, name
            cut_off = np.abs(array).max() <= 0.0401
            assert not (cut_off and array.size > 1000), f"{name} is truncated at two deviations"
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.kernel"} <= weights.keys()


def test_initial_weights_depend_on_the_seed() -> None:
    default, same, other = map(initial_weights, (None, nnx.Rngs(0), nnx.Rngs(1)))
    for name, array in default.items():
        np.testing.assert_array_equal(array, same[name])
        constant = name.endswith(("bias", "scale")) and name != "patch_embed.bias"
        assert constant or (array != other[name]).all(), name


def test_patch_size_and_overrides_reach_the_architecture() -> None:
    assert parameters("vit_small", patch_size=8) == 21_670_272
    fewer = parameters("vit_small", patch_size=16, image_size=32, depth=11)
    assert fewer == 21_665_664 - (197 - 5) * 384 - (12 * 384**2 + 13 * 384)


def parameters(name: str, **settings: Any) -> int:
    _, params, _ = abstract(lambda rngs: create_model(name, rngs=rngs, **settings))
    return sum(p.size for p in jax.tree.leaves(params))


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "embed_dim=32 is not divisible by num_heads=5: change one"),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"depth": 2.0}, "depth=2.0 must be a whole number of at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be a whole number of at least 1"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan must give the MLP a finite width"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf must give the MLP a finite width"),
        ({"mlp_ratio": 0.001}, "mlp_ratio=0.001 must give the MLP a finite width of at least 1"),
        ({"image_size": 18}, "image_size=18 is not a multiple of patch_size=4: change one"),
        ({"image_size": 2}, "image_size=2 is not a multiple of patch_size=4"),
        ({"image_size": 0}, "image_size=0 must be a whole number"),
        ({"image_size": (16, 16)}, r"image_size=\(16, 16\) must be a whole number"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 must be at least 0 and below 1"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1 must be"),
        ({"remat": "some"}, "remat='some' is unknown: choose one of none, dots, full"),
    ],
    ids=str,
)
def test_invalid_sizes_are_rejected(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VisionTransformer(rngs=nnx.Rngs(0), **TINY | overrides)


@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 1), (1, 3, 16, 3), (1, 16, 3, 3), (16, 16, 3), (0, 16, 16, 3)]
)
def test_images_of_the_wrong_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"B, H, W, 3.* at least 4 \(one patch\)") as error:
        tiny()(random_images(*shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("n", [0, 3])
def test_an_invalid_number_of_blocks_is_rejected(n: int) -> None:
    with pytest.raises(UsageError, match=rf"n={n} must be between 1 and the depth, 2"):
        tiny().get_intermediate_layers(random_images(1, 16, 16, 3), n=n)
