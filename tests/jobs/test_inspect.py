"""What `inspect` prints for each kind of checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.jobs.convert import convert
from dino_jax.jobs.inspect import inspect
from tests.conftest import GOLDENS
from tests.support import runs
from tests.support.torch_files import save

PTH = GOLDENS / "pth"
Rows = Callable[..., tuple[dict[str, str], list[list[str]]]]


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Rows:
    """Runs the job and returns {what: value} and the lines of the second table."""

    def run(file: object, **options: object) -> tuple[dict[str, str], list[list[str]]]:
        capsys.readouterr()
        inspect(str(file), **options)
        first, _, second = capsys.readouterr().out.partition("\n\n")
        cells = [line.split("  ", 1) for line in first.splitlines()[1:]]
        table = {what.strip(): value.strip() for what, value in cells}
        return table, [line.split() for line in second.splitlines()[1:]]

    return run


def test_full_checkpoint(rows: Rows) -> None:
    table, tensors = rows(PTH / "full_checkpoint.pth", tensors=True)
    expected = {
        "format": "torch",
        "kind": "full training state",
        "networks": "student, teacher",
        "architecture": "vit_tiny",
        "patch size": "8",
        "embed_dim": "48",
        "depth": "2",
        "head.out_dim": "96",
        "head.weight_norm": "True",
        "epoch": "100",
        "center": "yes",
        "optimizer": "state of 37 parameters",
        "ignored": "fp16_scaler",
        "tensors": "76",
        "args.momentum_teacher": "0.996",
        "args.arch": "vit_small",
    }
    assert {what: table[what] for what in expected} == expected
    assert len(tensors) == 76
    assert ["student.head.last_layer.weight_v", "96x32", "float32"] in tensors
    assert ["teacher.backbone.pos_embed", "1x17x48", "float32"] in tensors


@pytest.mark.parametrize("path", sorted(PTH.glob("backbone*.pth")), ids=lambda p: p.stem)
def test_backbone(path: Path, rows: Rows) -> None:
    table, tensors = rows(path, tensors=True)
    assert table["kind"] == "network"
    assert (table["architecture"], table["tensors"]) == ("vit_tiny", "30")
    assert table["numbers"] == "66768"
    half = {"backbone_fp16": "float16", "backbone_bf16": "bfloat16"}
    assert {line[-1] for line in tensors} == {half.get(path.stem, "float32")}
    assert table["MiB"] == ("0.1" if path.stem in half else "0.3")


def test_linear_head(rows: Rows) -> None:
    table, _ = rows(PTH / "linear.pth")
    assert table["kind"] == "linear classifier"
    assert (table["classes"], table["features"], table["epoch"]) == ("10", "192", "100")


def test_unknown_architecture(rows: Rows) -> None:
    table, tensors = rows(PTH / "views.pth", tensors=True)
    assert table["architecture"].startswith("unknown: the tensors (")
    assert {line[0] for line in tensors} == {f"teacher.backbone.{name}" for name in "abc"}


def test_optimizer_without_state(rows: Rows, tmp_path: Path) -> None:
    value = {"teacher": {"norm.bias": np.ones(1, np.float32)}, "optimizer": {"state": None}}
    table, _ = rows(save(tmp_path / "file.pth", value))
    assert table["optimizer"] == "state of 0 parameters"


def test_converted_folders(rows: Rows, tmp_path: Path) -> None:
    convert(str(PTH / "full_checkpoint.pth"), tmp_path / "full")
    table, tensors = rows(tmp_path / "full", tensors=True)
    expected = {
        "format": "orbax",
        "kind": "converted",
        "items": "student, teacher, training",
        "architecture": "vit_tiny",
        "converted.epoch": "100",
        "converted.args.epochs": "100",
        "head.out_dim": "96",
        "optim.momentum_teacher": "0.996",
    }
    assert {what: table[what] for what in expected} == expected
    assert ["teacher.params.backbone.pos_embed", "1x17x48", "float32"] in tensors
    convert(str(PTH / "backbone.pth"), tmp_path / "backbone")
    table, _ = rows(tmp_path / "backbone")
    assert (table["items"], table["numbers"]) == ("teacher", "66768")


def test_runs(rows: Rows) -> None:
    first, *_, last = runs.steps(runs.whole())
    table, _ = rows(runs.whole())
    assert (table["kind"], table["shown step"], table["images"]) == ("run", str(last), "85")
    assert table["optim.lr"] == "0.02"
    table, _ = rows(f"{runs.whole()}@{first}")
    assert table["shown step"] == str(first)
    assert table["steps"] == ", ".join(map(str, runs.steps(runs.whole())))


def test_hub_name(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dino_deitsmall16_pretrain"
    folder.mkdir()
    place = folder / "dino_deitsmall16_pretrain_full_checkpoint.pth"
    shutil.copy(PTH / "full_checkpoint.pth", place)
    monkeypatch.setenv("DINO_JAX_HUB", str(tmp_path))
    table, _ = rows("dino_vits16", what="full")
    assert (table["file"], table["args.lr"]) == (str(place), "0.0005")


def test_rejects(tmp_path: Path) -> None:
    for file, message in {
        "/nowhere": "is neither a hub name",
        str(tmp_path): "contains no checkpoints",
        f"{runs.whole()}@3": "has no checkpoint of step 3",
        str(PTH / "truncated.pth"): r"truncated\.pth",
    }.items():
        with pytest.raises(UsageError, match=message):
            inspect(file)
    damaged = Path(shutil.copytree(runs.whole(), tmp_path / "damaged"))
    for part in damaged.rglob("_METADATA"):
        part.write_text("{")
    with pytest.raises(UsageError, match=r"damaged: the checkpoint of step 15 is incomplete"):
        inspect(str(damaged))
