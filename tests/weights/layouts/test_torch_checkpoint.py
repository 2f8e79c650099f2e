"""Sorting the contents of `.pth` files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from tests.conftest import GOLDENS
from tests.support.torch_files import save

ONE = np.ones(1, np.float32)
LINEAR = {"linear.weight": np.ones((3, 2), np.float32), "linear.bias": np.ones(3, np.float32)}


def written(path: Path, value: Any) -> Any:
    return read_torch_checkpoint(save(path / "file.pth", value))


def test_full_checkpoint() -> None:
    found = read_torch_checkpoint(GOLDENS / "pth/full_checkpoint.pth")
    assert found.kind == "full"
    assert list(found.networks) == ["student", "teacher"]
    student, teacher = found.network("student"), found.network("teacher")
    for network in (student, teacher):
        assert list(network.backbone)[:2] == ["cls_token", "pos_embed"]
        assert list(network.head)[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]
        assert len(network.backbone) + len(network.head) == 38
    assert not np.array_equal(student.backbone["cls_token"], teacher.backbone["cls_token"])
    expected = np.load(GOLDENS / "pth/expected.npz")
    np.testing.assert_array_equal(found.center, expected["center"])
    assert found.epoch == 100
    assert found.args["arch"] == "vit_small"
    assert len(found.optimizer["state"]) == 37
    assert found.ignored == ("fp16_scaler",)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("pth/backbone*.pth")), ids=lambda p: p.stem)
def test_backbone_is_stored_as_teacher(path: Path) -> None:
    found = read_torch_checkpoint(path)
    assert (found.kind, list(found.networks), found.ignored) == ("backbone", ["teacher"], ())
    assert not found.network("teacher").head
    message = "which='student' is not in this file, which contains teacher: choose that"
    with pytest.raises(UsageError, match=message):
        found.network("student")


def test_linear_head() -> None:
    found = read_torch_checkpoint(GOLDENS / "pth/linear.pth")
    assert (found.kind, found.epoch) == ("linear", 100)
    assert {name: x.shape for name, x in found.linear.items()} == {
        "weight": (10, 192),
        "bias": (10,),
    }
    assert found.ignored == ("optimizer", "scheduler", "best_acc")
    with pytest.raises(UsageError, match="which contains a linear head"):
        found.network("teacher")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "backbone.",
        "module.backbone.",
        "module.module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.backbone.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.",
        "model.",
        "model.backbone._orig_mod.",
        "net.module.",
        "teacher_backbone.",
        "teacher.backbone.",
        "model.teacher.module.backbone.",
        "momentum_backbone.",
    ],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "teacher"])
def test_names_can_have_prefixes(prefix: str, wrapper: str | None, tmp_path: Path) -> None:
    tensors = {f"{prefix}cls_token": ONE, f"{prefix}norm.bias": ONE}
    found = written(tmp_path, {wrapper: tensors} if wrapper else tensors)
    assert list(found.network("teacher").backbone) == ["cls_token", "norm.bias"]


@pytest.mark.parametrize(
    "containers",
    [
        ["model"],
        ["state_dict_ema"],
        ["model_ema"],
        ["model_state_dict"],
        ["net"],
        ["model", "state_dict"],
        ["teacher", "state_dict"],
    ],
    ids=str,
)
def test_containers_are_opened(containers: list[str], tmp_path: Path) -> None:
    value: dict[str, Any] = {"norm.bias": ONE}
    for name in reversed(containers):
        value = {name: value}
    assert list(written(tmp_path, value).network("teacher").backbone) == ["norm.bias"]


def test_wrappers_inside_a_name_are_removed(tmp_path: Path) -> None:
    names = ["blocks._orig_mod.0._fsdp_wrapped_module.norm1.bias", "module.head.module.mlp.0.bias"]
    network = written(tmp_path, dict.fromkeys(names, ONE)).network("teacher")
    assert (list(network.backbone), list(network.head)) == (["blocks.0.norm1.bias"], ["mlp.0.bias"])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student_backbone.", "teacher_backbone."),
        ("student.backbone.", "teacher.backbone."),
        ("module.student.", "module.teacher._orig_mod."),
        ("backbone.", "momentum_backbone."),
        ("", "ema."),
    ],
)
def test_student_and_teacher_in_one_state_dict(student: str, teacher: str, tmp_path: Path) -> None:
    tensors = {f"{student}norm.bias": ONE, f"{teacher}norm.bias": 2 * ONE}
    found = written(tmp_path, {"state_dict": tensors, "epoch": 3})
    assert found.network("student").backbone["norm.bias"] == 1
    assert found.network("teacher").backbone["norm.bias"] == 2
    alone = written(tmp_path, {"state_dict": {f"{teacher}norm.bias": ONE}})
    assert list(alone.networks) == ["teacher"]


def test_student_alone_is_not_taken_for_the_teacher(tmp_path: Path) -> None:
    found = written(tmp_path, {"student_backbone.norm.bias": ONE})
    with pytest.raises(
        UsageError, match=r"which='teacher' is not .* contains student: choose that"
    ):
        found.network("teacher")


def test_average_beside_the_network_is_the_teacher(tmp_path: Path) -> None:
    value = {"state_dict": {"norm.bias": ONE}, "state_dict_ema": {"norm.bias": 2 * ONE}, "best": 1}
    found = written(tmp_path, value)
    assert found.network("student").backbone["norm.bias"] == 1
    assert found.network("teacher").backbone["norm.bias"] == 2
    assert found.ignored == ("best",)


def test_teacher_of_a_network_with_batch_norm(tmp_path: Path) -> None:
    """This teacher also runs under data parallelism, so its names have the prefix."""
    names = ["module.backbone.conv1.weight", "module.head.mlp.0.weight"]
    found = written(tmp_path, {"teacher": dict.fromkeys(names, ONE)}).network("teacher")
    assert (list(found.backbone), list(found.head)) == (["conv1.weight"], ["mlp.0.weight"])


def test_other_entries_are_ignored_by_name(tmp_path: Path) -> None:
    value = {"model": {"norm.bias": ONE}, "epoch": 7, "optimizer": {}, "best": 0.5}
    found = written(tmp_path, value)
    assert (found.epoch, found.ignored) == (7, ("optimizer", "best"))
    found = written(tmp_path, {"student": {"norm.bias": ONE}, "rng": 3})
    assert (found.kind, found.ignored) == ("full", ("rng",))


@pytest.mark.parametrize(
    "names",
    [
        ["fc.weight", "fc.bias"],
        ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
        ["fc_norm.weight", "fc_norm.bias", "head.weight"],
        ["classifier.weight", "momentum_classifier.bias"],
        ["criterion.center.center", "n_averaged"],
    ],
    ids=str,
)
@pytest.mark.parametrize("network", ["cls_token", "layer1.0.conv1.weight"])
def test_classifiers_and_losses_are_left_out(
    network: str, names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = written(tmp_path, dict.fromkeys([network, *names], ONE))
    assert (list(found.network("teacher").backbone), found.network("teacher").head) == (
        [network],
        {},
    )
    assert found.ignored == tuple(names)
    assert f"left out tensors that are no part of the network ({', '.join(names)})" in caplog.text


def test_batch_counts_missing_in_old_files_are_zero(tmp_path: Path) -> None:
    names = ["bn1.running_mean", "bn1.running_var", "head.mlp.1.running_var"]
    network = written(tmp_path, dict.fromkeys(names, ONE)).network("teacher")
    for part, name in ((network.backbone, "bn1"), (network.head, "mlp.1")):
        count = part[f"{name}.num_batches_tracked"]
        assert (count, count.shape, count.dtype) == (0, (), np.int64)
    kept = {"bn1.num_batches_tracked": np.array(7), "bn1.running_var": ONE}
    network = written(tmp_path, kept).network("teacher")
    assert network.backbone["bn1.num_batches_tracked"] == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([ONE], r"it contains a list, not weights by name: .*model\.state_dict\(\)"),
        (ONE, "it contains a single tensor, not weights by name"),
        ({}, "it contains no tensors: give a file with weights"),
        ({"student": {}}, "student contains no tensors"),
        ({"teacher": [ONE]}, "teacher contains no tensors"),
        ({"state": {0: {}}, "param_groups": []}, r"more than tensors \(state, param_groups\): giv"),
        (dict.fromkeys(range(14), ONE), r"more than tensors \(0, .*, 9 and 4 more\)"),
        ({"student": {"a": ONE}, "epoch": -1}, "epoch=-1 must be a whole number of at least"),
        ({"student": {"a": ONE}, "epoch": True}, "epoch=True must be a whole number"),
        ({"student": {"a": ONE}, "optimizer": [1]}, "its optimizer must be a dict, not a li"),
        ({"student": {"a": ONE}, "dino_loss": {"center": 1}}, "dino_loss contains more than t"),
        ({"teacher": {"a": ONE}, "dino_loss": ONE}, "its dino_loss must be a dict, not a n"),
        ({"teacher": {"a": ONE}, "optimizer": {"state": 3}}, "optimizer: its state must be a dict"),
        ({"norm.bias": ONE, "module.norm.bias": ONE}, "module.norm.bias occurs twice, with and"),
        (LINEAR | {"linear.bias": ONE}, r"weight has shape \[3, 2\] and the bias \[1\], but"),
    ],
)
def test_rejects(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(str(tmp_path))}/file.pth: .*{message}"):
        written(tmp_path, value)
