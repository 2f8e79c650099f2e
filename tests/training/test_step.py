"""Properties of the training step; test_train_parity compares it with the reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.data.transforms.multicrop import CropSettings
from dino_jax.models import DINOHead
from dino_jax.models.block import Block
from dino_jax.models.network import MultiCropModel, Network, abstract
from dino_jax.training import optim, schedules
from dino_jax.training.losses import dino_loss
from dino_jax.training.state import TrainState, init_meters, start_state
from dino_jax.training.step import MAX_SKIPPED_IN_A_ROW, StepSettings, compile_step, train_step
from dino_jax.training.views import make_views

PyTree = Any
Batch = dict[str, Any]
STEPS_PER_EPOCH, LOG_EVERY, TOTAL_STEPS = 5, 3, 20


def step_settings(optimizer: str = "adamw", **settings: Any) -> StepSettings:
    return StepSettings(
        tx=optim.make_optimizer(optimizer, clip_grad=3.0, norm_last_layer=True),
        lr=schedules.cosine(0.1, 0.001, total_steps=TOTAL_STEPS),
        weight_decay=schedules.cosine(0.04, 0.4, total_steps=TOTAL_STEPS),
        momentum=schedules.cosine(0.9, 1.0, total_steps=TOTAL_STEPS),
        teacher_temp=schedules.teacher_temperature(
            0.04, 0.07, warmup_epochs=2, steps_per_epoch=STEPS_PER_EPOCH
        ),
        steps_per_epoch=STEPS_PER_EPOCH,
        freeze_steps=0,
        **settings,
    )


def random_tree(shapes: PyTree, dtype: type = np.float32) -> PyTree:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: (0.3 * rng.standard_normal(p.shape)).astype(dtype), shapes)


# Gradient accumulation, with a transformer block, stochastic depth and augmented crops


class OneBlock(nnx.Module):
    """The smallest backbone with stochastic depth: a block on runs of four pixels, and a mean."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.block = Block(12, 2, 1.0, drop_path_rate=0.5, dtype=None, rngs=rngs)

    def __call__(self, images: jax.Array, keys: jax.Array | None) -> jax.Array:
        draws = None if keys is None else jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        return self.block(images.reshape(len(images), -1, 12), draws).mean(1)


def block_and_head(rngs: nnx.Rngs) -> MultiCropModel:
    return MultiCropModel(
        OneBlock(rngs), DINOHead(12, 16, num_layers=1, bottleneck_dim=6, rngs=rngs)
    )


def image_batch(number: int) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "canvas": rng.integers(0, 256, (number, 20, 20, 3), dtype=np.uint8),
        "size": rng.integers(12, 21, (number, 2), dtype=np.int32),
        "index": rng.permutation(100)[:number].astype(np.int32),
    }


def test_gradient_accumulation_equals_the_whole_batch() -> None:
    # Pixels in 0..1: with the usual mean and std, compilers may round float32 values differently.
    crops = CropSettings(
        global_size=8, local_size=4, local_number=2, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    with jax.enable_x64(True):
        graphdef, shapes, _ = abstract(block_and_head)
        params = random_tree(shapes, np.float64)
        results = []
        for accumulation_steps in (1, 4):
            settings = step_settings(
                "sgd",
                network=Network(graphdef),
                make_views=partial(make_views, seed=3, crops=crops),
                accumulation_steps=accumulation_steps,
            )
            state = start_state(params, {}, settings.tx, num_prototypes=16)
            state = jax.jit(partial(train_step, settings=settings))(state, image_batch(8))
            results.append(jax.device_get(state))
    whole, accumulated = results
    assert whole.skipped_steps == 0
    assert np.abs(whole.center).max() > 1e-3
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max() > 1e-6, whole.params, params)
    moved["head"]["last_layer"]["g"] = True  # fixed by norm_last_layer
    assert all(jax.tree.leaves(moved))
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=1e-9, atol=1e-12, err_msg=jax.tree_util.keystr(path)
        ),
        accumulated,
        whole,
    )


# Everything else, with a network that compiles quickly

K, C = 6, 3


def mean_color_network(
    params: PyTree, stats: PyTree, views: tuple[jax.Array, ...], keys: jax.Array | None = None
) -> tuple[jax.Array, PyTree]:
    """Same as `Network`; logits are linear in a view's mean colour, gradients are NaN for black."""
    del keys
    colors = jnp.concatenate([group.mean((2, 3)) for group in views], axis=1)  # [B, V, C]
    kernel = params["body"]["kernel"]
    logits = colors @ kernel * params["last_layer"]["g"] @ params["last_layer"]["v"]
    # Equal for all logits, so the loss is unchanged; its gradient is NaN if all pixels are black.
    logits += jnp.sqrt(jnp.square(colors.mean()) * jnp.square(kernel).sum())
    return logits, {"mean": 0.9 * stats["mean"] + 0.1 * colors.mean((0, 1))}


class Run:
    """A compiled step and its settings."""

    def __init__(self) -> None:
        self.settings = step_settings(
            network=mean_color_network,
            make_views=lambda batch, epoch: ((batch["global"], batch["local"]), None),
            log_every=LOG_EVERY,
        )
        state, batch = self.start(), self.batch(0)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        self.step = compile_step(self.settings, state, batch, shardings)

    def start(self) -> TrainState:
        shapes = {
            "body": {"kernel": np.zeros((C, 4))},
            "last_layer": {"g": np.zeros((1, 4)), "v": np.zeros((4, K))},
        }
        params = jax.tree.map(jnp.asarray, random_tree(shapes))
        return start_state(params, {"mean": jnp.zeros(C)}, self.settings.tx, num_prototypes=K)

    def batch(self, seed: int, scale: float = 1.0) -> Batch:
        rng = np.random.default_rng(seed)
        views = {"global": (4, 2, 6, 6, C), "local": (4, 3, 4, 4, C)}
        return {
            name: jnp.asarray(scale * (0.5 + rng.standard_normal(shape)), jnp.float32)
            for name, shape in views.items()
        }

    def after(self, state: TrainState, *batches: Batch) -> TrainState:
        """The state after these batches; the given state is not donated."""
        state = copied(state)
        for batch in batches:
            state = self.step(state, batch)
        return state


def copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def assert_same(found: TrainState, expected: TrainState) -> None:
    """Equal bit for bit, leaf by leaf."""
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path)),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def infinite(run: Run) -> Batch:
    """Images with one infinite pixel."""
    batch = run.batch(7)
    return batch | {"local": batch["local"].at[1, 0, 0, 0, 0].set(jnp.inf)}


def black(run: Run) -> Batch:
    """Images with a finite loss, but no finite gradient."""
    batch = run.batch(0, scale=0.0)
    state = run.start()
    logits, _ = mean_color_network(state.params, state.batch_stats, tuple(batch.values()))
    loss = dino_loss(logits, logits[:, :2], state.center, student_temp=0.1, teacher_temp=0.04).loss
    assert jnp.isfinite(loss)
    return batch


@pytest.mark.parametrize("poison", [infinite, black])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run: Run, poison: Any) -> None:
    before = run.after(run.start(), run.batch(0))
    after = run.after(before, poison(run))
    assert_same(after, before.replace(step=2, skipped_steps=1, skipped_in_a_row=1))
    recovered = run.after(after, poison(run), run.batch(1))
    assert recovered.step == 4
    assert recovered.skipped_steps == 2
    assert recovered.skipped_in_a_row == 0
    for old, new in [
        (after.params["body"], recovered.params["body"]),
        (after.teacher_params["body"], recovered.teacher_params["body"]),
        (after.center, recovered.center),
        (after.batch_stats, recovered.batch_stats),
        (after.teacher_batch_stats, recovered.teacher_batch_stats),
    ]:
        changed = jax.tree.map(lambda a, b: (a != b).any(), old, new)
        assert all(jax.tree.leaves(changed))


def test_after_too_many_skipped_steps_a_good_step_is_skipped_too(run: Run) -> None:
    start = run.after(run.start(), run.batch(0), run.batch(1), run.batch(2))
    poisoned = run.after(start, *[infinite(run)] * MAX_SKIPPED_IN_A_ROW)
    stopped = run.after(poisoned, run.batch(3))
    skipped = MAX_SKIPPED_IN_A_ROW + 1
    counters = {"step": 3 + skipped, "skipped_steps": skipped, "skipped_in_a_row": skipped}
    assert_same(stopped, start.replace(**counters, meters=stopped.meters))


def test_meters_sum_over_an_interval_and_an_epoch(run: Run) -> None:
    state = run.start()
    interval = epoch = jax.device_get(init_meters(K))
    interval, epoch = interval.interval, epoch.epoch
    for step in range(12):
        batch = infinite(run) if step in (6, 8) else run.batch(step)
        single = run.after(state.replace(meters=init_meters(K)), batch).meters
        if step % LOG_EVERY == 0:
            interval = jax.tree.map(np.zeros_like, interval)
        if step % STEPS_PER_EPOCH == 0:
            epoch = jax.tree.map(np.zeros_like, epoch)
        interval = jax.tree.map(np.add, interval, jax.device_get(single.interval))
        epoch = jax.tree.map(np.add, epoch, jax.device_get(single.epoch))
        state = run.after(state, batch)
        close = partial(np.testing.assert_allclose, rtol=1e-6, err_msg=f"step {step}")
        jax.tree.map(close, state.meters.interval, interval)
        jax.tree.map(close, state.meters.epoch, epoch)
    # The interval has steps 9 to 11, the epoch steps 10 and 11, counted from 0.
    assert state.meters.interval["steps"] == 3
    assert state.meters.epoch["steps"] == 2
    assert state.meters.interval["teacher_mean"].sum() == pytest.approx(3)
    assert state.meters.interval["center_change"] > 0
    assert state.meters.interval["grad_norm"] > 0


def test_a_batch_of_another_shape_is_rejected_and_not_traced(run: Run) -> None:
    smaller = jax.tree.map(lambda x: x[:2], run.batch(0))
    with pytest.raises(TypeError, match="compiled"):
        run.after(run.start(), smaller)


def test_the_state_is_donated(run: Run) -> None:
    state = run.start()
    after = run.step(state, batch := run.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))
