"""Attention maps and patch tokens of pictures, and the memory that they need."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dino_jax import create_model, memory, sharding
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import picture_features
from dino_jax.evaluate.features.compiled import compile_backbone
from dino_jax.evaluate.features.picture_features import (
    AttentionMaps,
    PatchTokens,
    batch_that_fits,
    check_attention,
)
from dino_jax.models.network import split
from tests.support.reference import assert_full_precision, call

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 40, 48, 3), np.uint8)
NORMALIZED = ((IMAGES / 255 - MEAN) / STD).astype(np.float32)


def compiled(model: nnx.Module, feature: Any) -> np.ndarray:
    """Computes the features of images on all devices; checks that products have full precision."""
    mesh = sharding.make_mesh()
    graphdef, *weights = split(model)
    weights = jax.device_put(weights, sharding.replicated(mesh))
    function = compile_backbone(feature, graphdef, mesh)
    assert_full_precision(function.lower(*weights, IMAGES, None).as_text())
    return np.asarray(function(*weights, IMAGES, None))


@pytest.mark.parametrize("model_name", ["vit_tiny", "xcit_nano_12_p8"])
def test_maps_equal_the_row_of_the_class_token(model_name: str) -> None:
    overrides: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    overrides |= {"patch_size": 8} if model_name.startswith("vit") else {}
    model = nnx.jit(lambda: create_model(model_name, **overrides))()
    maps = compiled(model, AttentionMaps(MEAN, STD))
    expected = call(type(model).get_last_selfattention, model, NORMALIZED)[:, :, 0, 1:]
    assert maps.shape == (2, 2, 5, 6)
    np.testing.assert_allclose(maps.reshape(expected.shape), expected, atol=1e-5)


def test_patch_tokens_come_from_the_last_block() -> None:
    model = create_model("vit_tiny", patch_size=8, depth=2, embed_dim=16, num_heads=2)
    tokens = compiled(model, PatchTokens(MEAN, STD))
    (expected,) = call(type(model).get_intermediate_layers, model, NORMALIZED)
    assert tokens.shape == (2, 5, 6, 16)
    np.testing.assert_allclose(tokens.reshape(2, 30, 16), expected[:, 1:], atol=1e-5)


def test_rejects_a_network_without_attention() -> None:
    model = nnx.eval_shape(lambda: create_model("resnet18", rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="runs/r is a ResNet, which has no attention: use a ViT"):
        check_attention(model, "runs/r")


def test_large_pictures_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT has a float32 matrix of 250 x 187 patches for each of 6 heads. An XCiT has none."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(memory, "machine_memory", lambda: 48 << 30)
    vit, xcit = (
        nnx.eval_shape(lambda name=name: create_model(name, rngs=nnx.Rngs(0)))
        for name in ("vit_small", "xcit_small_12_p16")
    )
    message = (
        r"4000x2992 pixels are 46751 tokens, whose attention weights take 48\.85 GiB of memory; "
        r"48\.00 GiB are available: give a smaller --size, such as --size 480 for"
    )
    with pytest.raises(UsageError, match=message):
        batch_that_fits((2992, 4000), vit, mesh, 8)
    assert batch_that_fits((2992, 4000), xcit, mesh, 8) == 8
    assert batch_that_fits((2960, 4000), vit, mesh, 8) == 1  # one at a time
    assert batch_that_fits((480, 480), vit, mesh, 8) == 8
    monkeypatch.setattr(
        picture_features, "device_limit", lambda _: 47 << 30
    )  # as reported by a GPU
    with pytest.raises(UsageError, match=r"47\.00 GiB are available"):
        batch_that_fits((2960, 4000), vit, mesh, 8)
    assert batch_that_fits((1480, 2000), vit, sharding.make_mesh(), 64) == 8 * 3
