"""Weights that cannot be loaded, and their error messages."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dino_jax
from dino_jax.errors import UsageError
from dino_jax.jobs.convert import convert
from dino_jax.jobs.inspect import inspect
from dino_jax.jobs.knn import knn
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from tests.conftest import GOLDENS
from tests.support import runs
from tests.support.torch_files import save

PTH = GOLDENS / "pth"
FULL = PTH / "full_checkpoint.pth"


def without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: without(t, "norm.bias"), ["backbone.norm.bias is missing"]),
        (
            lambda t: (
                without(t, "norm.bias", "blocks.1.attn.qkv.weight")
                | {"norm.weight": t["norm.weight"][:5], "mask_token": t["cls_token"]}
            ),
            [
                "backbone.norm.bias is missing",
                "backbone.blocks.1.attn.qkv.weight is missing",
                "backbone.mask_token is unexpected",
                r"backbone.norm.weight is \[5\], not \[48\]",
            ],
        ),
        (
            lambda t: {n.replace("blocks.1", "blocks.7"): x for n, x in t.items()},
            [
                "backbone.blocks.1.norm1.weight is missing",
                "blocks.1.mlp.fc1.bias is missing and 14 more$",
            ],
        ),
    ],
    ids=["missing", "several", "block"],
)
def test_reports_all_problems_together(
    change: Callable[[dict[str, Any]], dict[str, Any]], messages: list[str], tmp_path: Path
) -> None:
    tensors = change(read_torch_checkpoint(FULL).network("teacher").backbone)
    path = save(tmp_path / "file.pth", tensors)
    for message in messages:
        with pytest.raises(
            UsageError, match=rf"file\.pth: not the tensors of a vit_tiny.*{message}"
        ):
            dino_jax.load(path)


def test_classifier_and_foreign_heads_of_a_vit_are_left_out(tmp_path: Path) -> None:
    tensors = read_torch_checkpoint(FULL).network("teacher").backbone
    _, info = dino_jax.load(save(tmp_path / "plain.pth", tensors))
    for name in ("head.weight", "head.layers.0.weight"):
        others = {name: np.ones((9, 48), np.float32)}
        path = save(tmp_path / "file.pth", {"model": tensors | others})
        assert dino_jax.load(path)[1].sha256 == info.sha256
        with pytest.raises(UsageError, match=r"file\.pth: .*(without a head|last_layer.*missing)"):
            dino_jax.load_with_head(path)


def test_notes_weights_that_are_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = read_torch_checkpoint(FULL).network("teacher").backbone
    broken = np.full(48, np.nan, np.float32), np.full(48, np.inf, np.float32)
    broken = dict(zip(("norm.weight", "norm.bias"), broken, strict=True))
    dino_jax.load(save(tmp_path / "file.pth", tensors | broken))
    names = "backbone.norm.weight, backbone.norm.bias"
    assert f"NaN or infinity in the weights ({names})" in caplog.text


def test_rejects_a_file_without_the_requested_part() -> None:
    with pytest.raises(UsageError, match="which='student' is not in this file, which contains t"):
        dino_jax.load(PTH / "backbone.pth", which="student")
    with pytest.raises(UsageError, match=r"backbone\.pth: it contains a backbone without a head"):
        dino_jax.load_with_head(PTH / "backbone.pth")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder. Fails if a test file runs its code in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("*pwned*"))


@pytest.mark.parametrize("file", ["evil.pth", "truncated.pth", "views.pth"])
@pytest.mark.parametrize("entry", ["load", "convert", "inspect", "knn", "init_from"])
def test_all_entry_points_reject_files(file: str, entry: str, folder: Path) -> None:
    path, out = str(PTH / file), folder / "out"
    entries: dict[str, Callable[[], Any]] = {
        "load": lambda: dino_jax.load(path),
        "convert": lambda: convert(path, out),
        "inspect": lambda: inspect(path),
        "knn": lambda: knn(path, train="shapes:20@train", test="shapes:20@test"),
        "init_from": lambda: runs.train_here(runs.tiny_config(init_from=path), out),
    }
    if (file, entry) == ("views.pth", "inspect"):
        return entries[entry]()  # prints what the file contains
    with pytest.raises(UsageError, match=rf"{file}: "):
        entries[entry]()
    if entry != "init_from":  # a run creates its folder first
        assert not out.exists()
    return None
