"""Validation of a config before anything runs."""

import re
from typing import Any

import jax
import pytest

from configs import default
from dino_jax.config import checks
from dino_jax.errors import UsageError
from tests.support.debug_config import config_with

RESNET = {
    "name": "resnet18",
    "patch_size": None,
    "drop_path_rate": 0.0,
    **{f"overrides__{key}": None for key in ("image_size", "embed_dim", "depth", "num_heads")},
}


# Invalid settings


def test_accepts_the_configs() -> None:
    for devices in (1, 2, 4, 8):
        checks.check(config_with(), devices)
    config = default.get_config()
    config.data.train = "folder:/somewhere"  # not opened here
    checks.check(config, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__batch_size": 30},
            r"train.batch_size=30 is not divisible by 4 devices times "
            r"optim.accumulation_steps=1: choose a multiple of 4$",
        ),
        (
            {"optim__accumulation_steps": 3},
            r"train.batch_size=32 .* 4 devices .*accumulation_steps=3: choose a multiple of 12$",
        ),
        ({"train__batch_size": 0}, r"train.batch_size=0 .* choose a multiple of 4$"),
        ({"train__batch_size": -4}, r"train.batch_size=-4 "),
        ({"optim__accumulation_steps": 0}, r"optim.accumulation_steps=0 must be at least 1"),
        ({"data__num_threads": 1025}, r"data.num_threads=1025 is more than 1024: .* core$"),
        ({"data__train": None}, r"data.train is not set: add --config.data.train=folder:/"),
        (
            {"crops__global_size": 36},
            r"crops.global_size=36 is not a multiple of model.patch_size=8: .* change one of them$",
        ),
        ({"crops__local_size": 20}, r"crops.local_size=20 is not a multiple of model.patch_size"),
        ({"crops__local_size": 0}, r"crops.local_size=0 must be finite and above 0"),
        ({"model__patch_size": 0}, r"model.patch_size=0 must be finite and above 0"),
        ({"crops__mean": (0.5, 0.5)}, r"crops.mean=.* has 2 values: use 1 .* or 3 for colour$"),
        (
            {"eval__crop": 36},
            r"eval.crop=36 is not a multiple of model.patch_size=8: .* change one of them$",
        ),
        ({"eval__crop": 40}, r"eval.crop=40 must be at most eval.resize=32 and"),
        ({"eval__crop": 32, "eval__canvas_size": 24}, r"at most .* eval.canvas_size=24$"),
        ({"optim__name": "adam"}, r"optim.name='adam' is unknown: choose one of adamw, sgd, lars"),
        ({"train__sharding": "tp"}, r"train.sharding='tp' is unknown: choose one of dp, fsdp"),
        ({"train__epochs": 0}, r"train.epochs=0 must be finite and above 0"),
        ({"loss__teacher_temp": 0.0}, r"loss.teacher_temp=0.0 must be finite and above 0"),
        ({"loss__student_temp": float("nan")}, r"loss.student_temp=nan must be finite and above 0"),
        ({"seed": 2**32}, r"seed=4294967296 must be below 2\*\*32"),
        ({"crops__global_size": 100_000}, r"global_size=100000 must be at most 10000 pixels"),
        ({"log__every_steps": 0}, r"log.every_steps=0 must be finite and above 0"),
        ({"optim__lr": -0.1}, r"optim.lr=-0.1 must be finite and not negative"),
        ({"optim__lr": float("inf")}, r"optim.lr=inf must be finite and not negative"),
        ({"optim__warmup_epochs": -1}, r"optim.warmup_epochs=-1 must be finite and not negative"),
        ({"optim__clip_grad": -3.0}, r"optim.clip_grad=-3.0 must be finite and not negative"),
        (
            {"loss__center_momentum": 1.5},
            r"loss.center_momentum=1.5 must be between 0 and 1",
        ),
        ({"optim__momentum_teacher": -0.1}, r"optim.momentum_teacher=-0.1 must be between"),
        ({"eval__knn_ks": (10, 0)}, r"eval.knn_ks=\(10, 0\) must be whole numbers of at least 1"),
        ({"eval__knn_ks": ()}, r"eval.knn_ks=\(\) must be"),
        ({"eval__knn_ks": (10, 2.5)}, r"eval.knn_ks=\(10, 2.5\) must be whole numbers"),
        ({"eval__knn_ks": (20.0,)}, r"eval.knn_ks=\(20.0,\) must be whole numbers"),
        (
            {"eval__knn_test": None},
            r"eval.knn_every_epochs=1 enables .*eval.knn_test is not set: set it .* or set .*=0$",
        ),
        ({"crops__global_scale": (0.5, 1.5)}, r"crops.global_scale=\(0.5, 1.5\)"),
        ({"crops__local_number": -1}, r"crops.local_number=-1"),
        ({"model__name": "vit_smal"}, r"'vit_smal': choose one of vit_tiny, vit_small"),
        ({"model__dtype": "float16"}, r"model.dtype='float16' .* auto, float32, bfloat16"),
        ({"model__remat": "some"}, r"remat='some' is unknown: choose one of none, dots, full"),
        ({"model__overrides__num_heads": 5}, r"embed_dim=48 is not divisible by num_heads=5"),
        ({"model__overrides__image_size": 20}, r"image_size=20 is not a multiple of patch_size=8"),
        ({"model__name": "resnet18"}, r"resnet18 has no depth and no drop_path_rate and no embed"),
        (
            {"model__name": "xcit_tiny_12_p16", "model__overrides__image_size": None},
            r"patch_size=8 contradicts the name xcit_tiny_12_p16: leave it unset, or .* name",
        ),
        ({"head__out_dim": 0}, r"out_dim=0.* must be at least 1"),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checks.check(config_with(**changes), 4)


def test_local_size_is_not_checked_without_local_crops() -> None:
    checks.check(config_with(crops__local_number=0, crops__local_size=100), 1)


@pytest.mark.parametrize("crop", [36, 40], ids=["not a multiple", "larger than resize"])
def test_eval_crop_is_not_checked_without_knn(crop: int) -> None:
    checks.check(config_with(eval__knn_every_epochs=0, eval__crop=crop), 1)


def test_convolutional_networks_accept_any_image_size() -> None:
    odd = {"crops__global_size": 31, "crops__local_size": 17, "eval__crop": 29}
    checks.check(config_with(**{f"model__{k}": v for k, v in RESNET.items()}, **odd), 1)


# Valid but probably unintended settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim__warmup_epochs": 3}, r"optim.warmup_epochs=3 is longer than the run of 2 epochs"),
        (
            {"loss__warmup_teacher_temp_epochs": 30},
            r"loss.warmup_teacher_temp_epochs=30 is longer .* 2 epochs: .* loss.teacher_temp",
        ),
        ({"optim__freeze_last_layer": 2}, r"optim.freeze_last_layer=2 covers .* 2 epochs"),
        ({"loss__teacher_temp": 0.08}, r"loss.teacher_temp=0.08 is above 0.07"),
        ({"crops__local_number": 0}, r"crops.local_number=0.* crops.global_scale=\(0.14, 1.0\)"),
        (
            {"head__use_bn": True, "optim__accumulation_steps": 2},
            r"optim.accumulation_steps=2 changes .* BatchNorm, which normalizes each micro-batch",
        ),
        (
            {"optim__accumulation_steps": 2}
            | {f"model__{key}": value for key, value in RESNET.items()},
            r"optim.accumulation_steps=2 changes .* BatchNorm",
        ),
    ],
    ids=str,
)
def test_advice(changes: dict[str, Any], sentence: str) -> None:
    (found,) = checks.advice(config_with(**changes))
    assert re.search(sentence, found)
    checks.check(config_with(**changes), 1)  # not an error


def test_no_advice_for_ordinary_settings() -> None:
    assert checks.advice(config_with()) == []
    assert checks.advice(default.get_config()) == []
    without_locals = {"crops__local_number": 0, "crops__global_scale": (0.14, 1.0)}
    assert checks.advice(config_with(**without_locals)) == []


def test_check_creates_no_array() -> None:
    before = len(jax.live_arrays())
    config = default.get_config()
    config.data.train = "folder:/somewhere"
    checks.check(config, 1)
    assert len(jax.live_arrays()) == before
