"""The registry of architectures, tested by shapes only."""

from typing import Any

import jax
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import MODELS, create_model
from dino_jax.models.network import split

# Millions of parameters with a classifier of 1000 classes, as published by timm and torchvision.
PUBLISHED = {
    "vit_tiny": 5.72,
    "vit_small": 22.05,
    "vit_base": 86.57,
    "vit_large": 304.33,
    "vit_huge": 632.05,
    "deit_tiny": 5.72,
    "deit_small": 22.05,
    "deit_base": 86.57,
    "xcit_nano_12_p16": 3.05,
    "xcit_nano_12_p8": 3.05,
    "xcit_tiny_12_p16": 6.72,
    "xcit_tiny_12_p8": 6.71,
    "xcit_tiny_24_p16": 12.12,
    "xcit_tiny_24_p8": 12.11,
    "xcit_small_12_p16": 26.25,
    "xcit_small_12_p8": 26.21,
    "xcit_small_24_p16": 47.67,
    "xcit_small_24_p8": 47.63,
    "xcit_medium_24_p16": 84.40,
    "xcit_medium_24_p8": 84.32,
    "xcit_large_24_p16": 189.10,
    "xcit_large_24_p8": 188.93,
    "resnet18": 11.69,
    "resnet34": 21.80,
    "resnet50": 25.56,
    "resnet101": 44.55,
    "resnet152": 60.19,
    "resnext50_32x4d": 25.03,
    "resnext101_32x8d": 88.79,
    "wide_resnet50_2": 68.88,
    "wide_resnet101_2": 126.89,
}


def shapes(name: str, **settings: Any) -> nnx.Module:
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **settings))


def with_classifier(name: str, **settings: Any) -> int:
    """Number of parameters of an architecture, including a classifier of 1000 classes."""
    model = shapes(name, **settings)
    return sum(p.size for p in jax.tree.leaves(split(model)[1])) + 1000 * (model.embed_dim + 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_its_number_of_parameters(name: str) -> None:
    if depth := MODELS[name].keywords.get("depth"):  # all its blocks are equal
        one, two = (with_classifier(name, depth=n) for n in (1, 2))
        number = one + (depth - 1) * (two - one)
    else:
        number = with_classifier(name)
    assert round(number / 1e6, 2) == PUBLISHED[name]


def test_every_published_architecture_is_registered() -> None:
    assert PUBLISHED.keys() == MODELS.keys()


def test_models_are_created_in_evaluation_mode() -> None:
    assert shapes("resnet18").stem.norm.use_running_average
    assert shapes("xcit_nano_12_p8", depth=1).blocks[0].local.norm.use_running_average


def test_patch_size() -> None:
    assert shapes("vit_tiny", depth=1).patch_size == 16
    assert shapes("vit_tiny", depth=1, patch_size=8).patch_size == 8
    assert shapes("xcit_nano_12_p8", depth=1).patch_size == 8
    assert shapes("xcit_nano_12_p8", depth=1, patch_size=8).patch_size == 8
    assert shapes("resnet18").patch_size is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_smal", {}, r"'vit_smal': choose one of vit_tiny, .*xcit_nano_12_p16, .*resnet18"),
        ("xcit_small_12", {}, r"unknown model 'xcit_small_12': .*xcit_small_12_p16"),
        ("xcit_small_12_p16", {"patch_size": 8}, r"patch_size=8 contradicts .*xcit_small_12_p16"),
        ("xcit_small_12_p16", {"image_size": 224}, r"xcit_small_12_p16 has no image_size: "),
        ("resnet50", {"patch_size": 16}, r"resnet50 has no patch_size: .* settings are bottleneck"),
        (
            "resnet50",
            {"image_size": 224, "drop_path_rate": 0.1},
            r"resnet50 has no drop_path_rate and no image_size: leave it unset, or at 0",
        ),
        ("vit_tiny", {"groups": 2}, r"vit_tiny has no groups: .* settings are attention, depth, "),
    ],
)
def test_unknown_names_and_settings_are_rejected(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        shapes(name, **settings)
