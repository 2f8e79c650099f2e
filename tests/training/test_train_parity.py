"""Whole training runs, compared with the reference step by step."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dino_jax.models import DINOHead, VisionTransformer, create_model
from dino_jax.models.network import MultiCropModel, Network, split
from dino_jax.training import optim, schedules
from dino_jax.training.state import start_state
from dino_jax.training.step import StepSettings, train_step
from dino_jax.weights.layouts.mapping import to_torch
from tests.conftest import parity_cases
from tests.support.reference import recipe_images, recipe_trees

PyTree = Any
CASES = parity_cases("train_*.npz")


def build(meta: dict[str, Any]) -> MultiCropModel:
    rngs = nnx.Rngs(0)
    if meta["arch"] == "vit":
        backbone = VisionTransformer(
            patch_size=meta["patch"],
            image_size=meta["img"],
            embed_dim=meta["dim"],
            depth=meta["depth"],
            num_heads=meta["heads"],
            rngs=rngs,
        )
    else:
        backbone = create_model(meta["arch"], rngs=rngs)
    head = DINOHead(
        backbone.embed_dim,
        meta["out_dim"],
        hidden_dim=meta["hidden"],
        bottleneck_dim=meta["bottleneck"],
        use_bn=meta["use_bn"],
        rngs=rngs,
    )
    model = MultiCropModel(backbone, head)
    model.train()
    return model


def weights(
    meta: dict[str, Any], params: PyTree, stats: PyTree, family: str
) -> tuple[PyTree, PyTree]:
    """Parameters and running statistics of backbone and head, made by the goldens' recipe."""
    for part, kind in (("backbone", family), ("head", "head")):
        params[part], part_stats = recipe_trees(
            meta["seed"], params[part], stats.get(part, {}), kind, prefix=f"{part}."
        )
        if part in stats:
            stats[part] = part_stats
    return jax.tree.map(lambda x: x.astype(meta["dtype"]), (params, stats))


def sum_of_norms(*, norm_last_layer: bool) -> optax.GradientTransformation:
    """Returns the gradients unchanged; its state is the sum of the norms of all trained ones."""

    def update(
        grads: PyTree, state: jax.Array, params: PyTree | None = None
    ) -> tuple[PyTree, jax.Array]:
        labels = optim.parameter_labels(grads, norm_last_layer=norm_last_layer)
        norms = jax.tree.map(
            lambda g, label: 0.0 if label == "fixed" else jnp.linalg.norm(g), grads, labels
        )
        return grads, optax.tree.sum(norms).astype(state.dtype)

    return optax.GradientTransformation(
        lambda params: jnp.zeros((), jax.tree.leaves(params)[0].dtype), update
    )


def make_settings(meta: dict[str, Any], network: Network) -> StepSettings:
    total = meta["epochs"] * meta["iters"]
    return StepSettings(
        network=network,
        tx=optax.chain(
            sum_of_norms(norm_last_layer=meta["norm_last_layer"]),
            optim.make_optimizer(
                meta["opt"], clip_grad=meta["clip"], norm_last_layer=meta["norm_last_layer"]
            ),
        ),
        make_views=lambda batch, epoch: (tuple(batch.values()), None),
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

    groups = {"global": crops("global", 2, meta["img"])}
    if meta["local_n"]:
        groups["local"] = crops("local", meta["local_n"], meta["local"])
    return groups


def trained(params: PyTree, stats: PyTree, family: str) -> dict[str, np.ndarray]:
    """Parameters and running statistics with torch's names and layout."""
    return {
        f"{part}.{name}": array
        for part, kind in (("backbone", family), ("head", "head"))
        for name, array in to_torch(params[part], stats.get(part, {}), kind).items()
    }


def fingerprint(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float64)
    head = np.resize(array.reshape(-1)[:6], 6)
    return np.array([array.sum(), np.linalg.norm(array), *head])


def assert_schedules(settings: StepSettings, golden: dict[str, np.ndarray]) -> None:
    """Compares the values of all steps and epochs, relative to each schedule's maximum."""
    steps = jnp.arange(len(golden["lr"]))
    for name, schedule, moments in (
        ("lr", settings.lr, steps),
        ("wd", settings.weight_decay, steps),
        ("m", settings.momentum, steps),
        ("teacher_temp", settings.teacher_temp, steps[:: settings.steps_per_epoch]),
    ):
        expected = golden[name]
        atol = (1e-12 if jax.config.jax_enable_x64 else 1e-6) * expected.max()
        np.testing.assert_allclose(schedule(moments), expected, rtol=0, atol=atol, err_msg=name)


def final_tolerance(
    key: str, expected: np.ndarray, *, double: bool, full: bool
) -> dict[str, float]:
    """The tolerance for a final tensor or fingerprint."""
    if double:
        return {"rtol": 1e-5, "atol": 1e-9}
    norm = np.linalg.norm(expected) if full else expected[1]
    # The bias of the keys has no effect on a softmax, so its gradient is rounding noise, which
    # AdamW scales to steps of full size. All else is within 3e-5 of a tensor's norm in float32.
    return {"rtol": 0, "atol": norm * (3e-3 if key.endswith("attn.qkv.bias") else 3e-5)}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_run_equals_the_reference(path: Path, request: pytest.FixtureRequest) -> None:
    if "resnet" in path.stem:  # convolutions in float64 run longer than they compile
        request.getfixturevalue("all_optimizations")
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    double = meta["dtype"] == "float64"
    with jax.enable_x64(double), jax.default_matmul_precision("highest"):
        dtype = np.dtype(meta["dtype"])
        model = build(meta)
        family = model.backbone.family
        graphdef, params, stats = split(model)
        settings = make_settings(meta, Network(graphdef))
        params, stats = weights(meta, params, stats, family)
        state = start_state(params, stats, settings.tx, num_prototypes=meta["out_dim"])
        state = state.replace(center=state.center.astype(dtype))
        state = state.replace(meters=jax.tree.map(lambda x: x.astype(dtype), state.meters))
        step_fn = jax.jit(lambda state, batch: train_step(state, batch, settings=settings))
        assert_schedules(settings, golden)

        tolerance = 1e-6 if double else 1e-4
        for step in range(meta["epochs"] * meta["iters"]):
            state = step_fn(state, views(meta, step, dtype))
            loss = state.meters.interval["loss"]
            np.testing.assert_allclose(loss, golden["loss"][step], rtol=tolerance)
            np.testing.assert_allclose(
                state.opt_state[0], golden["grad_norms_sum"][step], rtol=tolerance
            )
            expected = golden["center"][step]
            # Elements near zero are sums of larger values, and have their rounding errors.
            atol = 1e-9 if double else tolerance * np.abs(expected).max()
            np.testing.assert_allclose(state.center[0], expected, rtol=tolerance, atol=atol)
        assert int(state.skipped_steps) == 0
        assert step_fn._cache_size() == 1, "the step was traced again"

    sides = {
        "student": trained(state.params, state.batch_stats, family),
        "teacher": trained(state.teacher_params, state.teacher_batch_stats, family),
    }
    assert list(sides["student"]) == list(meta["shapes"])
    for side, arrays in sides.items():
        for key, array in arrays.items():
            if key.endswith("num_batches_tracked"):
                continue  # only torch has it
            if meta["kind"] == "full":
                found, expected = array, golden[f"{side}/{key}"]
            else:
                found, expected = fingerprint(array), golden[f"{side}_fp/{key}"]
            tolerance = final_tolerance(key, expected, double=double, full=meta["kind"] == "full")
            np.testing.assert_allclose(found, expected, **tolerance, err_msg=key)
