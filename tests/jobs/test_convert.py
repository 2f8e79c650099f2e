"""Converting `.pth` files to checkpoints that can be evaluated and resumed."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

import dino_jax
from dino_jax.checkpoints import checkpoint, lock, read
from dino_jax.errors import UsageError
from dino_jax.jobs.convert import convert
from dino_jax.weights.formats.pth.file import read_torch_file
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.state.training_state import whole_state
from tests.conftest import GOLDENS
from tests.support import runs
from tests.support.torch_files import save

PTH = GOLDENS / "pth"
FULL = PTH / "full_checkpoint.pth"


def about(folder: Path) -> dict[str, Any]:
    """The facts stored in a converted checkpoint."""
    with read.open_for_reading(folder) as manager:
        return read.read_about(manager, 0)


def names(folder: Path) -> list[str]:
    """The names of the entries of a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_full_checkpoint_becomes_a_training_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    convert(str(FULL), out)
    assert capsys.readouterr().out == (
        f"{FULL}: vit_tiny, 0.1 M parameters, written to {out}\n"
        "ignored: fp16_scaler\n"
        "full training state after 100 epochs: resume it with main.py --config FILE --workdir "
        f"{out}\n"
    )
    assert names(out) == [".lock", "checkpoints"]  # no temporary files
    _, state = whole_state(read_torch_checkpoint(FULL))
    found, items = runs.arrays(out), checkpoint.to_items(state)
    expected = {
        name + re.sub(r"\[(\d+)\]", r"['\1']", jax.tree_util.keystr(path)): leaf
        for name, tree in items.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert len(found) == len(expected)
    optimizer = [name for name in expected if "opt_state" in name or "meters" in name]
    for name in expected.keys() - {*optimizer}:  # Orbax names the elements of a tuple differently
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    facts = about(out)["converted"]
    assert facts["epoch"] == 100
    assert facts["source"] == str(FULL)
    assert facts["args"]["data_path"] == "/x"
    assert len(facts["sha256"]) == 64


def test_backbone_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(str(FULL), tmp_path, backbone_only=True)
    assert (read.items_of(read.open_for_reading(tmp_path), 0)) == {"teacher"}
    assert "full training state" not in capsys.readouterr().out
    with pytest.raises(
        UsageError, match=r"contains a converted backbone without a training state: .*init"
    ):
        runs.train_here(runs.tiny_config(), tmp_path)


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name stands for its full checkpoint if released, else for its backbone."""
    monkeypatch.setenv("DINO_JAX_HUB", str(tmp_path / "mirror"))
    for path, file in {
        "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain_full_checkpoint.pth": FULL,
        "dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth": (
            PTH / "backbone.pth"
        ),
    }.items():
        place = tmp_path / "mirror" / path
        place.parent.mkdir(parents=True)
        shutil.copy(file, place)
    convert("dino_vits16", tmp_path / "full")
    assert about(tmp_path / "full")["converted"]["epoch"] == 100
    convert("dino_vits16_landmarks", tmp_path / "backbone")
    assert about(tmp_path / "backbone")["converted"]["epoch"] is None
    with pytest.raises(UsageError, match="DINO_JAX_HUB lacks"):
        convert("dino_vits16", tmp_path / "none", backbone_only=True)


# Invalid arguments, failures and concurrency


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (PTH / "linear.pth", "is a linear classifier: load it with `dino_jax.load_linear`"),
        ("nothing.pth", "file='nothing.pth' is neither a file nor a hub name"),
        (PTH, "is a folder of weights: give one of its files, such as "),
    ],
)
def test_rejects_files(file: str | Path, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        convert(str(file), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rejects_outputs(tmp_path: Path) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file.write_text("mine")
    for out, message in {
        taken: "is not empty: give a new folder, or overwrite with --force",
        file: "is a file: give a new folder",
        file / "below": f"out={file}/below cannot be written .Not a directory.: choose",
        Path("/proc/dino_jax"): "out=/proc/dino_jax cannot be written",
    }.items():
        with pytest.raises(UsageError, match=message):
            convert(str(PTH / "backbone.pth"), out)
    assert file.read_text() == "mine"
    convert(str(PTH / "backbone.pth"), taken, force=True)
    assert names(taken) == [".lock", "checkpoints", "notes.txt"]


def test_force_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(str(FULL), tmp_path)
    _, before = dino_jax.load(tmp_path, which="student")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", full_disk)
        for force, message in ((True, "cannot be written .*No space left"), (False, "not empty")):
            with pytest.raises(UsageError, match=message):
                convert(str(PTH / "backbone.pth"), tmp_path, force=force)
        with pytest.raises(UsageError, match="cannot be written"):
            convert(str(PTH / "backbone.pth"), tmp_path / "new")
    assert names(tmp_path) == [".lock", "checkpoints"]
    with pytest.raises(UsageError, match=r"evil\.pth"):
        convert(str(PTH / "evil.pth"), tmp_path, force=True)
    assert dino_jax.load(tmp_path, which="student")[1].sha256 == before.sha256

    convert(str(PTH / "backbone.pth"), tmp_path, force=True)
    with pytest.raises(UsageError, match="was converted from a backbone and"):
        dino_jax.load(tmp_path, which="student")


def test_rejects_a_folder_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps its checkpoints, and only one of two concurrent conversions succeeds."""
    file, out, module = str(PTH / "backbone.pth"), tmp_path / "out", sys.modules[convert.__module__]
    convert(str(FULL), out)
    with lock.take(out), pytest.raises(UsageError, match=f"{out} is in use by process"):
        convert(file, out, force=True)
    assert about(out)["converted"]["source"] == str(FULL)

    def slow(*arguments: Any) -> Any:
        monkeypatch.undo()
        convert(str(FULL), tmp_path / "new")
        return module._converted(*arguments)

    monkeypatch.setattr(module, "_converted", slow)
    with pytest.raises(UsageError, match="new is not empty: give a new folder, or overw"):
        convert(file, tmp_path / "new")
    assert about(tmp_path / "new")["converted"]["source"] == str(FULL)


def test_accepts_a_folder_with_only_a_lock(tmp_path: Path) -> None:
    lock.take(tmp_path).close()
    convert(str(PTH / "backbone.pth"), tmp_path)
    assert names(tmp_path) == [".lock", "checkpoints"]


def test_accepts_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(str(PTH / "backbone.pth"), Path("."))
    assert dino_jax.load(".")[1].arch == "vit_tiny"


# Resuming a converted checkpoint


def matching_config(**changes: object) -> ConfigDict:
    """The config of a run that can resume the checkpoint."""
    return runs.tiny_config(
        **{
            "model__name": "vit_tiny",
            "model__overrides__image_size": 32,
            "model__overrides__embed_dim": 48,
            "model__overrides__num_heads": None,
            "model__drop_path_rate": 0.0,
            "head__out_dim": 96,
            "head__num_layers": 3,
            "crops__global_scale": "0.4,1.0",
            "optim__lr": 0.0005,
            "optim__momentum_teacher": 0.996,
            "train__epochs": 3,
        }
        | changes
    )


def converted_after(epoch: int, folder: Path) -> Path:
    """The fixture's checkpoint, converted as if its run had finished `epoch` of three epochs."""
    found = read_torch_file(FULL)
    found["epoch"] = epoch
    found["args"]["epochs"] = 3
    convert(str(save(folder / "file.pth", found)), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_after(1, tmp_path_factory.mktemp("converted"))


def test_resumes_after_the_stored_epoch(converted: Path, tmp_path: Path) -> None:
    whole, cut = (Path(shutil.copytree(converted, tmp_path / name)) for name in ("whole", "cut"))
    result = runs.train_here(matching_config(), whole)
    assert (result["step"], result["finished"]) == (15, True)
    assert [line["epoch"] for line in runs.records(whole, "log.txt")] == [1, 2]
    counts = [int(x) for name, x in runs.arrays(whole).items() if name.endswith("count']")]
    assert counts == [11, 11]  # one step in the file and ten here

    # After a stop, with the newest checkpoints damaged, the converted one is used again.
    runs.train_here(matching_config(), cut, stop_after=7)
    steps = runs.steps(cut)
    assert steps[0] == 0
    assert steps[-1] == 7
    for step in steps[1:]:
        shutil.rmtree(cut / read.FOLDER / str(step) / "teacher")
    assert runs.train_here(matching_config(), cut)["finished"]
    runs.assert_equal(cut, whole)


def test_no_epoch_is_left_of_three(tmp_path: Path) -> None:
    folder = converted_after(3, tmp_path)
    result = runs.train_here(matching_config(), folder)
    assert result == {"step": 15, "total_steps": 15, "finished": True}
    assert not (folder / "log.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__lr": 0.1}, r"optim\.lr: 0\.0005 before, 0\.1 now"),
        ({"head__norm_last_layer": False}, r"head\.norm_last_layer: True before, False now"),
        ({"model__overrides__depth": 3}, r"model\.overrides\.depth: 2 before, 3 now"),
        ({"init_from": "x.pth"}, r"init_from: None before, 'x\.pth' now"),
    ],
)
def test_rejects_settings_that_differ_from_the_file(
    changes: dict[str, Any], message: str, converted: Path
) -> None:
    with pytest.raises(UsageError, match=f"with other settings .{message}.: use the same"):
        runs.train_here(matching_config(**changes), converted)
    assert runs.steps(converted) == [0]


def test_no_epoch_is_left_of_a_hundred(tmp_path: Path) -> None:
    convert(str(FULL), tmp_path)
    result = runs.train_here(matching_config(train__epochs=100), tmp_path)
    assert result == {"step": 500, "total_steps": 500, "finished": True}
    assert runs.steps(tmp_path) == [0]


def test_arguments_are_stored_as_plain_values(tmp_path: Path) -> None:
    found = read_torch_file(FULL)
    found["args"] |= {"tensor": np.ones(3, np.float32), "nested": {"a": 1}, "drop_path_rate": 0.1}
    convert(str(save(tmp_path / "file.pth", found)), tmp_path / "out")
    facts = about(tmp_path / "out")
    assert facts["converted"]["args"]["tensor"] == "[1. 1. 1.]"
    assert facts["converted"]["args"]["nested"] == "{'a': 1}"
    assert facts["config"]["model"]["drop_path_rate"] == 0.1
    assert json.dumps(facts)
    assert not os.path.exists(tmp_path / "out/.converting")
