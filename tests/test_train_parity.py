"""Whole training runs against the reference's, step by step."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from reference import fill, get, our_path, recipe_images, recipe_tensor, torch_layout

from dino_jax import optim, schedules
from dino_jax.models import DINOHead, VisionTransformer
from dino_jax.models.network import MultiCropModel, Network, split
from dino_jax.step import StepSettings, train_step
from dino_jax.train_state import start_state

PyTree = Any
CASES = sorted(GOLDENS.glob("train_vit*.npz"))


def build(meta: dict[str, Any]) -> MultiCropModel:
    rngs = nnx.Rngs(0)
    backbone = VisionTransformer(
        patch_size=meta["patch"],
        image_size=meta["img"],
        embed_dim=meta["dim"],
        depth=meta["depth"],
        num_heads=meta["heads"],
        rngs=rngs,
    )
    head = DINOHead(
        meta["dim"],
        meta["out_dim"],
        hidden_dim=meta["hidden"],
        bottleneck_dim=meta["bottleneck"],
        use_bn=meta["use_bn"],
        rngs=rngs,
    )
    return MultiCropModel(backbone, head)


def make_settings(meta: dict[str, Any], network: Network) -> StepSettings:
    total = meta["epochs"] * meta["iters"]
    return StepSettings(
        network=network,
        tx=optim.make_optimizer(
            meta["opt"], clip_grad=meta["clip"], norm_last_layer=meta["norm_last_layer"]
        ),
        make_views=lambda batch, epoch: ((batch["global"], batch["local"]), None),
        lr=schedules.cosine(
            meta["lr"] * meta["batch"] / 256,
            meta["min_lr"],
            total_steps=total,
            warmup_steps=meta["warmup_epochs"] * meta["iters"],
        ),
        weight_decay=schedules.cosine(meta["wd"], meta["wd_end"], total_steps=total),
        momentum=schedules.cosine(meta["momentum"], 1.0, total_steps=total),
        teacher_temp=schedules.teacher_temperature(
            meta["warmup_teacher_temp"],
            meta["teacher_temp"],
            warmup_epochs=meta["warmup_teacher_temp_epochs"],
            steps_per_epoch=meta["iters"],
        ),
        steps_per_epoch=meta["iters"],
        freeze_steps=meta["freeze"] * meta["iters"],
    )


def views(meta: dict[str, Any], step: int, dtype: np.dtype) -> dict[str, jax.Array]:
    def crops(kind: str, number: int, size: int) -> jax.Array:
        shape = (meta["batch"], 3, size, size)
        tags = [f"{meta['seed']}/step{step}/{kind}{c}" for c in range(number)]
        return jnp.asarray(np.stack([recipe_images(t, shape) for t in tags], axis=1), dtype)

    return {
        "global": crops("global", 2, meta["img"]),
        "local": crops("local", meta["local_n"], meta["local"]),
    }


def trained(params: PyTree, batch_stats: PyTree, key: str, meta: dict[str, Any]) -> np.ndarray:
    path = our_path(key, bn_head=meta["use_bn"])
    tree = batch_stats if key.endswith(("running_mean", "running_var")) else params
    return torch_layout(key, np.asarray(get(tree, path)), tuple(meta["shapes"][key]))


def fingerprint(array: np.ndarray) -> np.ndarray:
    head = np.resize(array.reshape(-1)[:6], 6)
    return np.array([array.sum(), np.linalg.norm(array), *head])


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_run_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    double = meta["dtype"] == "float64"
    with jax.enable_x64(double), jax.default_matmul_precision("highest"):
        dtype = np.dtype(meta["dtype"])
        graphdef, params, stats = split(build(meta))
        settings = make_settings(meta, Network(graphdef))
        is_stat = ("running_mean", "running_var")
        tensors = {
            key: recipe_tensor(meta["seed"], key, tuple(shape)).astype(dtype)
            for key, shape in meta["shapes"].items()
            if not key.endswith("num_batches_tracked")
        }
        params = fill(
            params,
            {k: v for k, v in tensors.items() if not k.endswith(is_stat)},
            bn_head=meta["use_bn"],
        )
        stats = fill(
            stats,
            {k: v for k, v in tensors.items() if k.endswith(is_stat)},
            bn_head=meta["use_bn"],
        )
        state = start_state(params, stats, settings.tx, num_prototypes=meta["out_dim"])
        state = state.replace(center=state.center.astype(dtype))
        state = state.replace(meters=jax.tree.map(lambda x: x.astype(dtype), state.meters))
        step_fn = jax.jit(lambda state, batch: train_step(state, batch, settings=settings))

        tolerance = 1e-6 if double else 1e-4
        for step in range(meta["epochs"] * meta["iters"]):
            state = step_fn(state, views(meta, step, dtype))
            loss = state.meters.interval["loss"]
            np.testing.assert_allclose(loss, golden["loss"][step], rtol=tolerance)
            np.testing.assert_allclose(
                state.center[0], golden["center"][step], rtol=tolerance, atol=1e-9
            )
        assert int(state.skipped_steps) == 0
        assert step_fn._cache_size() == 1, "the step was traced again"

    sides = {
        "student": (state.params, state.batch_stats),
        "teacher": (state.teacher_params, state.teacher_batch_stats),
    }
    compared = 0
    for name in golden.files:
        kind, _, key = name.partition("/")
        side, _, form = kind.partition("_")
        if not key or key.endswith("num_batches_tracked"):
            continue
        array = trained(*sides[side], key, meta)
        array = fingerprint(array) if form else array
        np.testing.assert_allclose(array, golden[name], rtol=1e-5, atol=1e-9, err_msg=name)
        compared += 1
    assert compared == 2 * len(tensors)


def test_there_are_training_goldens() -> None:
    assert CASES
