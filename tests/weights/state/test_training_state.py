"""A full checkpoint of the reference continues here exactly as it does there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dino_jax.config.build import flatten
from dino_jax.errors import UsageError
from dino_jax.weights.formats.pth.file import read_torch_file
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.state.training_state import known_settings, whole_state
from tests.support.next_step import FULL, fingerprint, our_step, views
from tests.support.torch_files import save

STORED = json.loads((Path(__file__).parents[2] / "support/next_step.json").read_text())


@pytest.fixture
def torch_run() -> Any:
    """The module of that name; skips the test if torch is not installed."""
    pytest.importorskip("torch", reason="compares with PyTorch's next step")
    from tests.support import torch_run

    return torch_run


def test_next_step_equals_the_stored_one() -> None:
    """Compares with numbers recorded by torch_run.py, in float64; does not need torch."""
    loss, networks, _ = our_step(FULL, step=0)
    assert loss == pytest.approx(STORED["loss"], rel=1e-9)
    before = read_torch_file(FULL)["student"]
    assert STORED["updates"].keys() == networks["student"].keys()
    for name, expected in STORED["updates"].items():
        update = networks["student"][name] - before[f"module.{name}"].astype(np.float64)
        # The step is at most 0.01 per element. Moments near zero amplify rounding.
        np.testing.assert_allclose(fingerprint(update), expected, rtol=1e-6, atol=1e-8)
    assert not np.any(STORED["updates"]["head.last_layer.weight_g"])


def adamw_of_the_fixture(torch_run: Any, path: Path) -> Any:
    path.write_bytes(FULL.read_bytes())
    return torch_run.TorchRun(torch_run.load(path))


def frozen_adamw(torch_run: Any, path: Path, *, thawed: bool) -> Any:
    """A new optimizer after one step with a frozen last layer and one with a trained last layer."""
    import torch

    file = torch_run.load(FULL)
    file["optimizer"]["state"] = {}
    run = torch_run.TorchRun(file)
    run.step(views(1), frozen=True)
    if thawed:
        run.step(views(2))
    torch.save(run.file(), path)
    return torch_run.TorchRun(torch_run.load(path))


def sgd(torch_run: Any, path: Path) -> Any:
    import torch

    run = torch_run.TorchRun(torch_run.load(FULL), "sgd")
    run.step(views(1))
    torch.save(run.file(), path)
    return torch_run.TorchRun(torch_run.load(path), "sgd")


@pytest.mark.parametrize(
    "make",
    [
        adamw_of_the_fixture,
        lambda *a: frozen_adamw(*a, thawed=False),
        lambda *a: frozen_adamw(*a, thawed=True),
        sgd,
    ],
    ids=["adamw", "frozen", "thawed", "sgd"],
)
def test_next_step_equals_torchs(
    make: Callable[[Any, Path], Any], torch_run: Any, tmp_path: Path
) -> None:
    """Compares everything after one float64 step from a file written by torch."""
    path = tmp_path / "full.pth"
    run = make(torch_run, path)
    before = {which: run.tensors(which) for which in torch_run.NETWORKS}
    before = {w: {n: x.numpy().copy() for n, x in t.items()} for w, t in before.items()}
    loss = run.step(views(0))
    ours, networks, center = our_step(path, step=0)
    assert ours == pytest.approx(loss, rel=1e-9)
    np.testing.assert_allclose(center, run.center.numpy(), rtol=1e-9, atol=1e-12)
    for which, tensors in networks.items():
        expected = run.tensors(which)
        assert list(tensors) == list(expected)
        moved = [n for n, x in expected.items() if not np.array_equal(x, before[which][n])]
        assert set(expected) - set(moved) <= {"head.last_layer.weight_g"}
        for name, tensor in expected.items():
            np.testing.assert_allclose(
                tensors[name] - before[which][name],
                tensor.numpy() - before[which][name],
                rtol=1e-6,
                atol=1e-8,
                err_msg=f"{which} {name}",
            )


# Invalid training states


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A changed full checkpoint."""
    found = read_torch_file(FULL)
    change(found)
    return save(path / "file.pth", found)


def without_head(found: dict[str, Any]) -> None:
    for which in ("student", "teacher"):
        found[which] = {name: x for name, x in found[which].items() if "head." not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("student"), "the training state lacks student: .*--backbone-only"),
        (
            lambda f: [f.pop(name) for name in ("epoch", "optimizer", "dino_loss")],
            "the training state lacks dino_loss, epoch, optimizer",
        ),
        (without_head, "its student has no head: convert the file with"),
        (
            lambda f: f["dino_loss"].update(center=np.zeros((1, 5), np.float32)),
            r"the center has shape \[1, 5\], but the head has 96 prototypes",
        ),
        (
            lambda f: f["teacher"].pop("head.last_layer.weight_g"),
            "teacher: not the tensors of a vit_tiny: head.last_layer.weight_g is missing",
        ),
        (
            lambda f: f["teacher"].update(
                {n: f["teacher"][n][:9] for n in f["teacher"] if "last_layer" in n}
            ),
            r"teacher: not the tensors of a vit_tiny: head.last_layer.weight_g is \[9, 1\], not",
        ),
        (lambda f: f["args"].update(optimizer="adam"), "unknown optimizer 'adam': choose one of"),
        (lambda f: f["args"].update(optimizer="sgd"), "lacks momentum_buffer, in the right sh"),
    ],
)
def test_rejects(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    found = read_torch_checkpoint(changed(tmp_path, change))
    with pytest.raises(UsageError, match=message):
        whole_state(found)


def test_converts_everything_in_a_file() -> None:
    found = read_torch_checkpoint(FULL)
    config, state = whole_state(found)
    np.testing.assert_array_equal(state.center, found.center)
    assert (int(state.step), int(state.skipped_steps)) == (0, 0)
    assert not any(np.any(x) for x in jax.tree.leaves(state.meters))
    flat = {key: value for key, value in flatten(config).items() if value is not None}
    assert flat["model.name"] == "vit_tiny"
    assert flat["head.norm_last_layer"] is True
    assert flat["optim.name"] == "adamw"
    assert flat["optim.momentum_teacher"] == 0.996
    assert flat["crops.global_scale"] == [0.4, 1.0]
    assert flat["train.epochs"] == 100
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(pointers) == len(set(pointers))  # otherwise the state could not be donated


def test_arguments_become_settings() -> None:
    args = {
        "arch": "vit_small",
        "lr": 0.0005,
        "local_crops_scale": [0.05, 0.25],
        "batch_size_per_gpu": 64,
        "world_size": 16,
        "freeze_last_layer": 1,
        "optimizer": "sgd",
        "use_fp16": True,
        "seed": np.ones(3),  # not a plain type
        "epochs": None,
    }
    assert known_settings(args) == {
        "optim.lr": 0.0005,
        "crops.local_scale": (0.05, 0.25),
        "train.batch_size": 1024,
        "optim.freeze_last_layer": 1,
        "optim.name": "sgd",
    }
    assert known_settings({"batch_size_per_gpu": 64}) == {}
