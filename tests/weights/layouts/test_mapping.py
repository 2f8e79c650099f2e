"""The mapping of torch's names and layouts, compared with manifests of the released files."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.models import MODELS, DINOHead, create_model
from dino_jax.models.network import abstract
from dino_jax.weights.layouts.dino import FAMILIES, VECTOR
from dino_jax.weights.layouts.mapping import shape_problems, to_ours, to_torch, torch_shapes
from tests.conftest import parity_cases

MANIFESTS = {
    name: shapes
    for path in parity_cases("manifests*.json")
    for name, shapes in json.loads(path.read_text()).items()
}
ARCHITECTURES = {
    "dino_vits16": ("vit_small", {"patch_size": 16}),
    "dino_vits8": ("vit_small", {"patch_size": 8}),
    "dino_vitb16": ("vit_base", {"patch_size": 16}),
    "dino_vitb8": ("vit_base", {"patch_size": 8}),
}


def released(name: str) -> tuple[str, Any]:
    """A released network's family, and its abstract parameters and statistics."""
    if "head" in name:
        return "head", abstract(lambda rngs: DINOHead(384, rngs=rngs))[1:]
    arch, settings = ARCHITECTURES.get(name, (name.removeprefix("dino_"), {}))
    trees = abstract(lambda rngs: create_model(arch, rngs=rngs, **settings))[1:]
    return MODELS[arch].func.family, trees


def numbers(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """Numbers whose period differs from the length of every axis."""
    return np.resize(np.arange(251), shape).astype(dtype)


def tiny_vit(**settings: Any) -> Any:
    sizes = {"image_size": 32, "embed_dim": 8, "depth": 2, "num_heads": 2}
    return abstract(lambda rngs: create_model("vit_tiny", rngs=rngs, **sizes | settings))[1:]


def tensors_of(trees: Any, family: str, **settings: Any) -> dict[str, np.ndarray]:
    shapes = torch_shapes(*trees, family, **settings)
    return {name: numbers(empty.shape, np.float32) for name, empty in shapes.items()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest_maps_completely_in_both_directions(name: str) -> None:
    expected = {key.removeprefix("head."): tuple(shape) for key, shape in MANIFESTS[name].items()}
    family, trees = released(name)
    shapes = {key: empty.shape for key, empty in torch_shapes(*trees, family).items()}
    assert shapes == expected
    assert list(shapes) == list(expected)  # also in the same order

    tensors = {key: numbers(shape) for key, shape in expected.items()}
    backwards = dict(reversed(tensors.items()))
    params, batch_stats, counts = to_ours(backwards, family)
    assert shape_problems(params, trees[0]) + shape_problems(batch_stats, trees[1]) == []
    found = to_torch(params, batch_stats, family, counts=counts)
    assert list(found) == list(expected)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(found[key], tensor, strict=True, err_msg=key)


def test_dtypes_are_kept_and_missing_counts_are_zero() -> None:
    _, trees = released("dino_resnet50")
    dtypes = {"weight": ml_dtypes.bfloat16, "bias": np.float16, "num_batches_tracked": np.int64}
    tensors = {
        name: numbers(empty.shape, dtypes.get(name.rpartition(".")[2], np.float32)) + 7
        for name, empty in torch_shapes(*trees, "resnet").items()
    }
    params, batch_stats, counts = to_ours(tensors, "resnet")
    for name, array in to_torch(params, batch_stats, "resnet", counts=counts).items():
        np.testing.assert_array_equal(array, tensors[name], strict=True, err_msg=name)
    for name, array in to_torch(params, batch_stats, "resnet").items():
        if name.endswith("num_batches_tracked"):
            assert (array, array.dtype, array.shape) == (0, np.int64, ()), name


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_layers": 1}, "mlp.weight mlp.bias"),
        ({"num_layers": 1, "use_bn": True}, "mlp.weight mlp.bias"),
        ({"num_layers": 2}, "mlp.0.weight mlp.0.bias mlp.2.weight mlp.2.bias"),
        (
            {"num_layers": 2, "use_bn": True},
            "mlp.0.weight mlp.0.bias mlp.1.weight mlp.1.bias mlp.1.running_mean mlp.1.running_var "
            "mlp.1.num_batches_tracked mlp.3.weight mlp.3.bias",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_norm", [True, False])
def test_heads_of_any_depth(settings: dict[str, Any], names: str, weight_norm: bool) -> None:
    trees = abstract(
        lambda rngs: DINOHead(
            6, 5, hidden_dim=4, bottleneck_dim=3, weight_norm=weight_norm, rngs=rngs, **settings
        )
    )[1:]
    last = ["weight_g", "weight_v"] if weight_norm else ["weight"]
    tensors = tensors_of(trees, "head")
    assert list(tensors) == names.split() + [f"last_layer.{name}" for name in last]
    params, batch_stats, _ = to_ours(tensors, "head")
    assert shape_problems(params, trees[0]) + shape_problems(batch_stats, trees[1]) == []


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_patch_embeddings_of_any_channels(in_channels: int) -> None:
    trees = tiny_vit(in_channels=in_channels)
    tensors = tensors_of(trees, "vit", in_channels=in_channels)
    assert tensors["patch_embed.proj.weight"].shape == (8, in_channels, 16, 16)
    params, _, _ = to_ours(tensors, "vit")
    kernel = params["patch_embed"]["kernel"].reshape(16, 16, in_channels, 8)
    assert kernel[2, 5, 0, 3] == tensors["patch_embed.proj.weight"][3, 0, 2, 5]
    found = to_torch(params, {}, "vit", in_channels=in_channels)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)
    with pytest.raises(UsageError, match=r"square patches with in_channels=5: use the in"):
        to_torch(params, {}, "vit", in_channels=5)


# Mismatches


def test_all_problems_are_reported_together() -> None:
    tensors = tensors_of(tiny_vit(), "vit")
    for name in ("cls_token", "norm.weight"):
        del tensors[name]
    tensors["head.weight"] = tensors["fc.bias"] = numbers((2,))
    tensors["blocks.1.attn.qkv.weight"] = numbers((24, 8, 1))
    with pytest.raises(UsageError, match=r"^these are not the tensors of a vit: ") as error:
        to_ours(tensors, "vit")
    for problem in (
        "'head.weight' matches no rows",
        "'fc.bias' matches no rows",
        "cls_token is missing",
        "norm.weight is missing",
        "blocks.1.attn.qkv.weight has shape [24, 8, 1], expected 2 axes",
    ):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 4


@pytest.mark.parametrize(
    "name",
    [
        "blocks.01.norm1.bias",
        "blocks.-1.norm1.bias",
        "blocks.\u0661.norm1.bias",  # an Arabic digit
        "blocks.1.norm1.bias\n",
        f"blocks.1{'0' * 6}.norm1.bias",
        f"blocks.1{'0' * 5000}.norm1.bias",  # more than int() takes
    ],
    ids=lambda name: name[:24],
)
def test_similar_names_do_not_match(name: str) -> None:
    with pytest.raises(UsageError, match="matches no rows"):
        to_ours(tensors_of(tiny_vit(), "vit") | {name: numbers((8,))}, "vit")


def test_rejects_a_name_that_matches_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"layer{i}.bias": ("layers.{i}.bias", VECTOR), "layer1.bias": ("first", VECTOR)}
    monkeypatch.setitem(FAMILIES, "twice", (table,))
    with pytest.raises(UsageError, match=r"of a twice: 'layer1.bias' matches 2 rows$"):
        to_ours({"layer1.bias": numbers((8,)), "layer2.bias": numbers((8,))}, "twice")


def test_rejects_arrays_of_another_family() -> None:
    params, batch_stats = tiny_vit()
    with pytest.raises(
        UsageError, match=r"not the arrays of a xcit: .*'pos_embed' matches no rows"
    ):
        torch_shapes(params, batch_stats, "xcit")
    with pytest.raises(UsageError, match=r"'swin' is unknown: choose one of vit, xcit, resnet, h"):
        to_torch(params, batch_stats, "swin")


def test_shape_problems() -> None:
    found = {"a": np.zeros(3), "b": {0: np.zeros((2, 2))}, "d": np.zeros(())}
    expected = {"a": np.zeros(4), "b": {0: np.zeros((2, 2)), 1: np.zeros(1)}}
    assert shape_problems(found, expected) == [
        "b.1 is missing",
        "d is unexpected",
        "a is [3], not [4]",
    ]
    assert shape_problems({"b.0": np.zeros(1)}, {"b": {0: np.zeros(1)}}) == []
