"""Features taken from a backbone's outputs, compared with its layers."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax import create_model
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.tokens import BlockTokens, ClassToken, ClassTokens, probed_feature

MODEL = create_model("vit_tiny", patch_size=8, image_size=16, embed_dim=16, depth=3, num_heads=2)
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


def test_class_tokens_of_the_last_blocks_are_in_order() -> None:
    layers = MODEL.get_intermediate_layers(IMAGES, 3)
    found = ClassTokens(n_last_blocks=3)(MODEL, IMAGES)
    np.testing.assert_array_equal(found, np.concatenate([x[:, 0] for x in layers], axis=1))
    np.testing.assert_allclose(found[:, -16:], ClassToken()(MODEL, IMAGES), atol=1e-5)


def test_patch_means_alternate_with_class_tokens() -> None:
    last = np.asarray(MODEL.get_intermediate_layers(IMAGES)[0])
    found = np.asarray(ClassTokens(n_last_blocks=1, avgpool_patchtokens=True)(MODEL, IMAGES))
    assert found.shape == (2, 32)
    np.testing.assert_array_equal(found[:, 0::2], last[:, 0])
    np.testing.assert_allclose(found[:, 1::2], last[:, 1:].mean(axis=1), atol=1e-6)


def test_tokens_of_a_block() -> None:
    layers = MODEL.get_intermediate_layers(IMAGES, 2)
    every = BlockTokens("all", from_last=2)(MODEL, IMAGES)
    np.testing.assert_array_equal(every, layers[0])
    patches = BlockTokens("patches", from_last=2)(MODEL, IMAGES)
    np.testing.assert_array_equal(patches, layers[0][:, 1:])
    np.testing.assert_array_equal(BlockTokens()(MODEL, IMAGES), layers[1][:, 0])


def test_rejects_unavailable_features() -> None:
    with pytest.raises(UsageError, match=r"n_last_blocks=4 must be 1 with avgpool.*set n_last"):
        ClassTokens(n_last_blocks=4, avgpool_patchtokens=True)
    with pytest.raises(UsageError, match="n=4 must be between 1 and the depth, 3"):
        ClassTokens(n_last_blocks=4)(MODEL, IMAGES)
    resnet = jax.eval_shape(lambda: jnp.zeros(()))  # anything without layers
    with pytest.raises(UsageError, match="does not give the tokens of single blocks"):
        BlockTokens()(resnet, IMAGES)


def test_probed_feature_follows_the_paper() -> None:
    vit = {"blocks": [None] * 12, "get_intermediate_layers": None}
    small, base = mock.Mock(embed_dim=384, **vit), mock.Mock(embed_dim=768, **vit)
    resnet = mock.Mock(spec=["embed_dim"])
    assert probed_feature(small, None, None) == ClassTokens(4)
    assert probed_feature(base, None, None) == ClassTokens(1, avgpool_patchtokens=True)
    assert probed_feature(base, 4, None) == ClassTokens(4)
    assert probed_feature(small, None, True) == ClassTokens(1, avgpool_patchtokens=True)
    assert probed_feature(resnet, None, None) == ClassToken()
