"""Converts a config to plain values."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import default
from dino_jax.config import build
from dino_jax.config.spec import HeadSpec, ModelSpec
from dino_jax.errors import UsageError
from tests.support.debug_config import config_with


def test_dtype_by_name() -> None:
    assert build.compute_dtype("auto", "cpu") == "float32"
    assert build.compute_dtype("auto", "gpu") == build.compute_dtype("auto", "tpu") == "bfloat16"
    assert build.compute_dtype("float32", "gpu") == "float32"
    assert build.compute_dtype("bfloat16", "cpu") == "bfloat16"
    with pytest.raises(UsageError, match=r"model\.dtype='half' is unknown: choose auto, float32"):
        build.compute_dtype("half", "cpu")


def test_model_follows_the_config() -> None:
    config = config_with(
        model__drop_path_rate=0.3,
        model__remat="dots",
        model__dtype="bfloat16",
        model__overrides__mlp_ratio=2.0,
        head__use_bn=True,
        head__num_layers=2,
        crops__mean=(0.5,),
        crops__std=(0.25,),
    )
    spec, note = build.compute_spec(config, "cpu", jax.devices())
    assert note is None
    model = nnx.eval_shape(lambda: spec.model(nnx.Rngs(0)))
    backbone, head = model.backbone, model.head
    assert (backbone.embed_dim, len(backbone.blocks), backbone.num_heads) == (48, 2, 3)
    assert (backbone.in_channels, backbone.remat) == (1, "dots")
    assert backbone.pos_embed.shape == (1, 17, 48)
    assert backbone.blocks[-1].drop_path_rate == 0.3
    assert backbone.blocks[0].mlp.fc1.kernel.shape == (48, 96)
    assert backbone.patch_embed.dtype == head.layers[0].dtype == jnp.bfloat16
    assert [layer.kernel.shape for layer in head.layers] == [(48, 64), (64, 32)]
    assert head.last_layer.v.shape == (32, 256)
    assert [norm.use_running_average for norm in head.norms] == [False]  # in training mode


def test_unset_overrides_keep_the_defaults() -> None:
    spec = build.model_spec(default.get_config())
    model = nnx.eval_shape(lambda: spec.backbone(nnx.Rngs(0)))
    assert (model.embed_dim, len(model.blocks), model.pos_embed.shape[1]) == (384, 12, 197)


@pytest.mark.parametrize("name", ["vit_small", "xcit_small_12_p16", "resnet50"])
def test_spec_settings_round_trip(name: str) -> None:
    sizes = {"depth": 2, "num_heads": 3} if name == "vit_small" else {}
    head = HeadSpec(64, num_layers=2, weight_norm=False)
    spec = ModelSpec(name, overrides=sizes, head=head, resize=40, crop=32, canvas_size=64)
    stored = ConfigDict(json.loads(build.spec_settings(spec).to_json()))
    assert build.model_spec(stored) == spec
    bare = dataclasses.replace(spec, head=None, mean=(0.0,), std=(1.0,))
    assert build.model_spec(build.spec_settings(bare)) == bare


def test_schedules_follow_the_config() -> None:
    config = config_with(
        train__epochs=10,
        train__batch_size=512,
        optim__lr=0.001,
        optim__min_lr=1e-5,
        optim__warmup_epochs=2,
        optim__momentum_teacher=0.99,
        loss__warmup_teacher_temp=0.03,
        loss__teacher_temp=0.06,
        loss__warmup_teacher_temp_epochs=4,
    )
    values = build.make_schedules(config, steps_per_epoch=5)
    at = {name: [float(schedule(s)) for s in (0, 9, 10, 49)] for name, schedule in values.items()}
    # Scaled by 512 / 256. Warm-up takes two epochs; step 9 is its last.
    assert at["lr"][:3] == pytest.approx([0, 0.002, 0.002])
    assert 1e-5 < at["lr"][3] < 2e-5
    assert at["weight_decay"][0] == pytest.approx(0.04)
    assert 0.399 < at["weight_decay"][3] < 0.4
    assert at["momentum"][0] == pytest.approx(0.99)
    assert 0.9999 < at["momentum"][3] < 1
    assert at["teacher_temp"] == pytest.approx([0.03, 0.04, 0.05, 0.06])
    assert values.keys() == {"lr", "weight_decay", "momentum", "teacher_temp"}


def test_flatten_names_every_key() -> None:
    flat = build.flatten(default.get_config())
    assert flat["optim.lr"] == 0.0005
    assert flat["model.overrides.depth"] is None
    assert flat["crops.mean"] == [0.485, 0.456, 0.406]
    assert flat["seed"] == 0
    assert not any(isinstance(value, ConfigDict | dict) for value in flat.values())
