"""Inferring the settings of every architecture from tensors."""

import json
from typing import Any

import numpy as np
import pytest

from dino_jax.config.spec import HeadSpec, ModelSpec
from dino_jax.errors import UsageError
from dino_jax.models import MODELS, DINOHead, create_model
from dino_jax.models.network import abstract
from dino_jax.weights.hub import RELEASED
from dino_jax.weights.layouts.architecture import infer
from dino_jax.weights.layouts.mapping import torch_shapes
from dino_jax.weights.layouts.torch_checkpoint import Tensors, TorchNetwork
from tests.conftest import GOLDENS

MANIFESTS = json.loads((GOLDENS / "manifests.json").read_text())


def empty(shapes: dict[str, Any]) -> Tensors:
    """Tensors that use no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def model_of(backbone: Tensors, head: Tensors | None = None, **options: Any) -> ModelSpec:
    return infer(TorchNetwork(backbone, head or {}), **options)


def backbone(name: str, **overrides: Any) -> Tensors:
    """The tensors of a backbone, made from its shapes."""
    _, *trees = abstract(lambda rngs: create_model(name, rngs=rngs, **overrides))
    channels = overrides.get("in_channels", 3)
    return torch_shapes(*trees, MODELS[name].func.family, in_channels=channels)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name in RELEASED])
def test_infers_released_models(name: str) -> None:
    spec, released = model_of(empty(MANIFESTS[name])), RELEASED[name]
    assert spec.arch == released.arch
    assert spec.patch_size in (None, released.patch_size)  # for XCiTs it is part of the name
    assert spec.overrides == {}
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.head is None


def test_every_hub_name_is_in_the_registry() -> None:
    for name, released in RELEASED.items():
        assert released.arch in MODELS, name
        sizes = MODELS[released.arch].keywords
        if released.arch.startswith("xcit"):
            assert sizes["patch_size"] == released.patch_size


def test_infers_the_released_head() -> None:
    head = {n.removeprefix("head."): shape for n, shape in MANIFESTS["dino_head_vits16"].items()}
    spec = model_of(empty(MANIFESTS["dino_vits16"]), empty(head))
    assert spec.head == HeadSpec(65536, hidden_dim=2048, bottleneck_dim=256, num_layers=3)


@pytest.mark.parametrize(
    "options",
    [
        # The released ResNet-50's head.
        {"num_layers": 2, "hidden_dim": 4096, "weight_norm": False, "out_dim": 60000},
        {"num_layers": 1},
        {"num_layers": 1, "weight_norm": False, "bottleneck_dim": 64},
        {"num_layers": 4, "use_bn": True, "hidden_dim": 128},
    ],
    ids=str,
)
def test_infers_every_kind_of_head(options: dict[str, Any]) -> None:
    _, *trees = abstract(lambda rngs: DINOHead(384, rngs=rngs, **options))
    found = model_of(empty(MANIFESTS["dino_vits16"]), torch_shapes(*trees, "head")).head
    assert found == HeadSpec(**{"out_dim": 65536} | options)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name, build in MODELS.items() if build.func.family == "resnet"),
        "vit_tiny",
        "vit_large",
        "vit_huge",
        "xcit_nano_12_p16",
    ],
)
def test_infers_every_registered_architecture(name: str) -> None:
    spec = model_of(backbone(name))
    assert spec.arch == name
    assert spec.overrides == {}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("xcit")])
def test_infers_xcits_from_width_depth_and_patches(name: str) -> None:
    """Uses only the tensors that determine these sizes."""
    sizes = MODELS[name].keywords
    blocks = {f"blocks.{i}.gamma1": [1] for i in range(sizes["depth"])}
    halvings = range(0, 2 * sizes["patch_size"].bit_length() - 2, 2)
    embed = {f"patch_embed.proj.{i}.0.weight": [8, 3, 3, 3] for i in halvings}
    others = {"cls_token": [1, 1, sizes["embed_dim"]], "cls_attn_blocks.0.norm1.weight": [1]}
    assert model_of(empty(blocks | embed | others)).arch == name


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_tiny", {"depth": 3, "image_size": 32, "patch_size": 4}),
        ("vit_base", {"depth": 1, "mlp_ratio": 2.0, "in_channels": 1}),
        ("vit_small", {"embed_dim": 49, "num_heads": 7, "depth": 2, "mlp_ratio": 1 / 49}),
    ],
)
def test_unusual_sizes_become_overrides(name: str, overrides: dict[str, Any]) -> None:
    tensors = backbone(name, **overrides)
    spec = model_of(tensors, num_heads=overrides.get("num_heads"))
    _, *trees = abstract(spec.backbone)
    found = torch_shapes(*trees, "vit", in_channels=overrides.get("in_channels", 3))
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in tensors.items()}


def test_attention_heads_of_a_vit_of_unusual_width(caplog: pytest.LogCaptureFixture) -> None:
    tensors = backbone("vit_tiny", embed_dim=48, depth=1)
    assert "num_heads" not in model_of(tensors).overrides  # vit_tiny's 3
    assert "the tensors of a ViT of width 48 do not determine" in caplog.text
    assert "assuming 3. To change it, pass num_heads" in caplog.text
    caplog.clear()
    assert model_of(tensors, num_heads=6).arch == "vit_small"  # which has 6 heads
    assert model_of(tensors, num_heads=4).overrides["num_heads"] == 4
    assert not caplog.records
    wide = backbone("vit_tiny", embed_dim=896, num_heads=14, depth=1)
    assert model_of(wide).overrides["num_heads"] == 14
    assert "of width 896 do not determine its number of attention heads: assuming 14" in caplog.text


@pytest.mark.parametrize(
    ("name", "heads"), [("vit_tiny", 3), ("vit_small", 6), ("vit_large", 16), ("vit_huge", 16)]
)
def test_heads_of_registered_widths_are_known(
    name: str, heads: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert model_of(backbone(name, depth=1)).sizes["num_heads"] == heads
    assert not caplog.records


def sines(tensors: Tensors) -> Tensors:
    """With the fixed position table of MAE and MoCo-v3, up to its second patch."""
    table = np.zeros(tensors["pos_embed"].shape, np.float32)
    side = table.shape[-1] // 4
    table[0, 1, side : 2 * side] = table[0, 1, 3 * side :] = 1
    table[0, 2:] = 0.5
    return tensors | {"pos_embed": table}


@pytest.mark.parametrize(
    ("name", "heads"), [("vit_small", 12), ("vit_base", 12), ("vit_large", 16), ("vit_huge", 16)]
)
def test_heads_of_moco_v3_and_mae(name: str, heads: int, caplog: pytest.LogCaptureFixture) -> None:
    tensors = sines(backbone(name, depth=1))
    assert model_of(tensors).sizes["num_heads"] == heads
    assert ("identifies MoCo-v3's ViT" in caplog.text) == (name == "vit_small")
    assert model_of(tensors, num_heads=8).sizes["num_heads"] == 8


def changed(name: str, **shapes: Any) -> Tensors:
    """A released backbone with other shapes for some tensors, or without them if None."""
    found = MANIFESTS[name] | {key.replace("__", "."): shape for key, shape in shapes.items()}
    return empty({key: shape for key, shape in found.items() if shape is not None})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (empty({"a": [1], "b": [1]}), r"the tensors \(a, b\) are not from a ViT, XCiT or"),
        (changed("dino_vits16", pos_embed=[1, 198, 384]), "and 198 positions: only square patches"),
        (
            changed("dino_vits16", patch_embed__proj__weight=[384, 3, 16, 8]),
            "patches of 16x8 pixels and 197 positions",
        ),
        (
            changed("dino_vits16", pos_embed=None, patch_embed__proj__weight=[3]),
            r"pos_embed is missing; patch_embed.proj.weight is \[3\], expected 4 axes of",
        ),
        (
            changed("dino_vits16", pos_embed=[1, 0, 384]),
            r"pos_embed is \[1, 0, 384\], expected 3 a",
        ),
        (
            changed("dino_xcit_small_12_p8", cls_token=[1, 1, 100]),
            "no registered xcit has embed_dim=100, depth=12, patch_size=8",
        ),
        (
            changed("dino_resnet50") | empty({"layer2.4.conv1.weight": [1]}),
            r"no registered resnet has depths=\(3, 5, 6, 3\), bottleneck=True, groups=1, wid",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_rejects(tensors: Tensors, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_of(tensors)


def test_rejects_a_head_without_prototypes() -> None:
    with pytest.raises(UsageError, match=r"last_layer\.weight is missing; mlp\.0\.w"):
        model_of(empty(MANIFESTS["dino_vits16"]), empty({"layers.0.weight": [1000, 384]}))


def test_long_lists_of_names_are_capped() -> None:
    with pytest.raises(UsageError, match=r"\(t0, .*, t9 and 30 more\) are not from a ViT"):
        model_of(empty({f"t{i}": [1] for i in range(40)}))
