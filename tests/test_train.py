"""Trains kinds of networks and layouts that no other test covers, for a few real steps.

They take long to compile, so the networks are as shallow and narrow as possible.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dino_jax import train
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.config.file import override, read_config
from dino_jax.models import MODELS, resnet, xcit
from tests.support import runs

TWO_STEPS = {
    "data.train": "shapes:16@train",
    "train.batch_size": 8,
    "train.epochs": 1,
    "optim.warmup_epochs": 0,
    "optim.freeze_last_layer": 0,
    "optim.clip_grad": 0,
    "model.drop_path_rate": 0,
    "log.every_steps": 1,
    "eval.knn_every_epochs": 0,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks sizes that have no setting, and disables checkpoints, which other tests cover."""
    monkeypatch.setattr(xcit, "CLASS_BLOCKS", 1)
    monkeypatch.setattr(resnet, "STAGE_WIDTHS", (16, 16, 32, 32))
    shallow = partial(MODELS["resnet18"], depths=(1, 1, 1, 1))
    monkeypatch.setitem(MODELS, "resnet18", shallow)
    monkeypatch.setattr(RunCheckpoints, "save", lambda *_: None)


def two_steps(name: str, **changes: object) -> ConfigDict:
    """The debug version of a config with 8 images per step."""
    config = read_config(f"{runs.ROOT}/configs/{name}.py:debug")
    keys = TWO_STEPS | {key.replace("__", "."): value for key, value in changes.items()}
    if config.model.overrides.depth:
        keys["model.overrides.depth"] = 1
    override(config, [f"--config.{key}={value}" for key, value in keys.items()])
    return config


@pytest.mark.parametrize("name", ["xcit_small_12", "resnet50"])
def test_one_device_and_eight_train_alike(name: str, tmp_path: Path) -> None:
    config = two_steps(name, optim__name="sgd", crops__local_number=0)
    for devices in (8, 1):
        assert runs.train_here(config, tmp_path / str(devices), devices=devices)["finished"]
    first, second = runs.records(tmp_path / "8")
    assert second["skipped_steps"] == 0
    for key in ("loss", "grad_norm", "teacher_entropy", "center_norm"):
        assert 0 < first[key] < np.inf
        assert 0 < second[key] != first[key]
        for record, alone in zip((first, second), runs.records(tmp_path / "1"), strict=True):
            np.testing.assert_allclose(record[key], alone[key], rtol=1e-4, err_msg=key)


def test_fsdp_remat_and_accumulation_without_weight_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = []

    def compile_step(settings: Any, state: Any, *rest: Any) -> Any:
        arrays = jax.tree.leaves((state.params, state.teacher_params, state.opt_state))
        spread.append(sum(not array.sharding.is_fully_replicated for array in arrays))
        return compiler(settings, state, *rest)

    compiler = train.compile_step
    monkeypatch.setattr(train, "compile_step", compile_step)
    config = two_steps(
        "vit_base8",
        head__weight_norm=False,
        optim__accumulation_steps=2,
        train__batch_size=16,
        data__train="shapes:32@train",
    )
    assert (config.train.sharding, config.model.remat) == ("fsdp", "dots")
    for devices in (8, 1):
        runs.train_here(config, tmp_path / str(devices), devices=devices)
    assert spread[0] > 4
    assert spread[1] == 0
    ours, alone = (
        [record["loss"] for record in runs.records(tmp_path / devices)] for devices in ("8", "1")
    )
    assert alone[0] != alone[1]
    np.testing.assert_allclose(ours, alone, rtol=1e-5)
