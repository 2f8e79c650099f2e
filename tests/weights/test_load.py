"""Loading models from files and converted folders."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import dino_jax
from dino_jax.errors import UsageError
from dino_jax.jobs.convert import convert
from dino_jax.jobs.knn import knn
from dino_jax.models import DINOHead, create_model
from dino_jax.models.network import abstract, split
from dino_jax.weights.layouts.mapping import to_ours, to_torch, torch_shapes
from dino_jax.weights.layouts.torch_checkpoint import TorchNetwork, read_torch_checkpoint
from dino_jax.weights.load import from_torch
from tests.conftest import GOLDENS, parity_cases
from tests.support.reference import recipe_images, recipe_tensor
from tests.support.torch_files import save

PTH = GOLDENS / "pth"
FULL = PTH / "full_checkpoint.pth"
MANIFESTS = json.loads((GOLDENS / "manifests.json").read_text())
# Maximum difference of a feature. float32 has the tolerance of all forward goldens. The other files
# contain weights rounded to 11 and 8 bits, compared with features of the unrounded weights.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}


def recorded(folder: Path) -> dict[str, Any]:
    """The reference's outputs for the networks of a folder, and its input images."""
    expected = dict(np.load(folder / "expected.npz"))
    meta = json.loads(str(expected["meta"]))
    images = recipe_images(meta["images"], (2, 3, meta["img"], meta["img"]))
    return expected | {"meta": meta, "images": images}


@pytest.mark.parametrize("path", parity_cases("pth/backbone*.pth"), ids=lambda p: p.stem)
def test_backbone_file_features(path: Path) -> None:
    model, info = dino_jax.load(path)
    expected = recorded(path.parent)
    meta = expected["meta"]
    assert (info.patch_size, info.embed_dim, info.which) == (meta["patch"], meta["dim"], "teacher")
    assert (info.dtype, info.source, info.resize, info.crop) == ("float32", str(path), 256, 224)
    stored = read_torch_checkpoint(path).network("teacher").backbone
    tolerance = TOLERANCES[stored["cls_token"].dtype.name]
    features = model(expected["images"])
    np.testing.assert_allclose(features, expected["teacher_cls"], rtol=0, atol=tolerance)

    # Converted back to the file's names, layout and precision, the bytes are equal.
    tensors = to_torch(*split(model)[1:], "vit")
    assert list(tensors) == list(stored)
    for name, tensor in stored.items():
        found = tensors[name].astype(tensor.dtype)
        np.testing.assert_array_equal(found, tensor, strict=True, err_msg=name)


@pytest.mark.parametrize("path", parity_cases("pth/full_checkpoint*.pth"), ids=lambda p: p.stem)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_full_checkpoint_features_and_logits(which: str, path: Path) -> None:
    model, head, info = dino_jax.load_with_head(path, which=which)
    expected = recorded(path.parent)
    features = model(expected["images"])
    np.testing.assert_allclose(features, expected[f"{which}_cls"], rtol=0, atol=1e-4)
    if which == "teacher":
        np.testing.assert_allclose(head(features), expected["teacher_head"], rtol=0, atol=1e-4)
    assert info.which == which
    stored = read_torch_checkpoint(path).network(which)
    for part, family, tensors in ((model, "vit", stored.backbone), (head, "head", stored.head)):
        found = to_torch(*split(part)[1:], family)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name], tensor, strict=True, err_msg=name)


@pytest.mark.parametrize("backbone_only", [False, True])
def test_converted_folder_gives_the_same_model(backbone_only: bool, tmp_path: Path) -> None:
    convert(str(FULL), tmp_path / "out", backbone_only=backbone_only)
    model, info = dino_jax.load(tmp_path / "out")
    expected = recorded(PTH)
    features = model(expected["images"])
    np.testing.assert_allclose(features, expected["teacher_cls"], rtol=0, atol=1e-4)
    assert info.sha256 == dino_jax.load(FULL)[1].sha256
    assert (info.resize, info.crop, info.patch_size) == (256, 224, expected["meta"]["patch"])
    if backbone_only:
        with pytest.raises(UsageError, match="was converted from a backbone and"):
            dino_jax.load(tmp_path / "out", which="student")
        with pytest.raises(UsageError, match="was converted from a backbone and"):
            dino_jax.load_with_head(tmp_path / "out")
        return
    head, info = dino_jax.load_with_head(tmp_path / "out")[1:]
    np.testing.assert_allclose(head(features), expected["teacher_head"], rtol=0, atol=1e-4)
    student, _ = dino_jax.load(tmp_path / "out", which="student")
    features = student(expected["images"])
    np.testing.assert_allclose(features, expected["student_cls"], rtol=0, atol=1e-4)


def test_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    """The reader's arrays are views of the file, but the model's arrays must be copies."""
    path = tmp_path / "file.pth"
    path.write_bytes(FULL.read_bytes())
    model, info = dino_jax.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, leaf in nnx.to_pure_dict(nnx.state(model)).items():
        assert np.any(np.asarray(jax.tree.leaves(leaf)[0])), name
    assert info.sha256 == dino_jax.load(FULL)[1].sha256


def test_hash_covers_everything_that_determines_the_features(tmp_path: Path) -> None:
    """Includes attention heads, which no array determines, and running statistics; no dtype."""
    path = PTH / "backbone.pth"
    three, six = (dino_jax.load(path, num_heads=number)[1].sha256 for number in (3, 6))
    assert three != six
    assert dino_jax.load(path, dtype="bfloat16")[1].sha256 == three  # 3 heads are assumed
    tensors = tensors_of("resnet18")
    shifted = tensors | {"bn1.running_mean": tensors["bn1.running_mean"] + 1}
    hashes = [
        dino_jax.load(save(tmp_path / f"{i}.pth", found))[1].sha256
        for i, found in enumerate((tensors, tensors, shifted))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_linear_head() -> None:
    classifier, info = dino_jax.load_linear(PTH / "linear.pth")
    tensors = read_torch_checkpoint(PTH / "linear.pth").linear
    features = np.random.default_rng(0).standard_normal((3, 192), np.float32)
    expected = features @ tensors["weight"].T + tensors["bias"]
    np.testing.assert_allclose(classifier(features), expected, rtol=1e-5, atol=1e-5)
    assert (info.in_features, info.num_classes) == tensors["weight"].shape[::-1]
    assert (info.weights, info.class_names) == (None, None)
    for load in (dino_jax.load, dino_jax.load_with_head):
        with pytest.raises(UsageError, match=r"is a linear classifier: give a backbone"):
            load(PTH / "linear.pth")
    with pytest.raises(UsageError, match=r"backbone\.pth is a backbone, not a linear classifier"):
        dino_jax.load_linear(PTH / "backbone.pth")
    with pytest.raises(UsageError, match=r"linear\.pth is a linear classifier: give a backbone"):
        knn(str(PTH / "linear.pth"), train="shapes:20@train", test="shapes:20@test")


def tensors_of(name: str, head: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
    """The recipe's tensors for a network, named as in a file."""
    model = abstract(lambda rngs: create_model(name, rngs=rngs))
    parts = {"": (model, "resnet" if "resnet" in name else "xcit")}
    if head is not None:
        width = nnx.eval_shape(lambda: create_model(name)).embed_dim
        parts["backbone."] = parts.pop("")
        parts["head."] = abstract(lambda rngs: DINOHead(width, rngs=rngs, **head)), "head"
    found = {}
    for part, ((_, *trees), family) in parts.items():
        for key, empty in torch_shapes(*trees, family).items():
            tensor = recipe_tensor(0, key, empty.shape)
            if key.endswith("tracked"):
                tensor = np.array(3)
            found[prefix + part + key] = tensor
    return found


def assert_holds(model: nnx.Module, tensors: dict[str, np.ndarray], family: str) -> None:
    params, batch_stats, _ = to_ours(tensors, family)
    for found, expected in zip(split(model)[1:], (params, batch_stats), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_torchvision_resnet(tmp_path: Path) -> None:
    tensors = tensors_of("resnet18")
    classifier = {"fc.weight": np.ones((9, 512), np.float32), "fc.bias": np.ones(9, np.float32)}
    model, info = dino_jax.load(save(tmp_path / "resnet.pth", tensors | classifier))
    assert (info.arch, info.patch_size, info.embed_dim) == ("resnet18", None, 512)
    assert_holds(model, tensors, "resnet")
    old = {name: x for name, x in tensors.items() if not name.endswith("tracked")}
    again, _ = dino_jax.load(save(tmp_path / "old.pth", old))
    assert_holds(again, tensors, "resnet")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("xcit_nano_12_p16", {"out_dim": 64, "hidden_dim": 16, "bottleneck_dim": 8}),
        # Like the released ResNet-50's head: few layers, no weight normalization.
        ("resnet18", {"out_dim": 64, "hidden_dim": 16, "num_layers": 2, "weight_norm": False}),
        ("resnet18", {"out_dim": 64, "hidden_dim": 16, "bottleneck_dim": 8, "use_bn": True}),
    ],
)
def test_full_checkpoint_with_batch_norm(name: str, head: dict[str, Any], tmp_path: Path) -> None:
    tensors = tensors_of(name, head, prefix="module.")
    path = save(tmp_path / "full.pth", {"student": tensors, "teacher": tensors, "epoch": 3})
    backbone, head_module, info = dino_jax.load_with_head(path)
    assert info.arch == name
    for part, module in (("backbone", backbone), ("head", head_module)):
        prefix = f"module.{part}."
        own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        assert_holds(module, own, "head" if part == "head" else name.partition("_")[0].rstrip("18"))


@pytest.mark.parametrize(
    "name",
    [
        "dino_vits8",
        "dino_vitb16",
        "dino_resnet50",
        "dino_xcit_small_12_p16",
        "dino_xcit_medium_24_p8",
    ],
)
def test_every_released_file_fits_completely(name: str) -> None:
    """Compares names, shapes and order with the file, without computing anything."""
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in MANIFESTS[name].items()}
    spec, arrays = from_torch(TorchNetwork(tensors, {}))
    assert spec.head is None
    count = sum(x.size for name, x in tensors.items() if not name.endswith("tracked"))
    assert sum(x.size for x in jax.tree.leaves(arrays)) == count
