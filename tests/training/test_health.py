"""The diagnosis of runs that must collapse, and of one that must learn."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import pytest

from configs import default
from dino_jax.config import build
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import open_source
from dino_jax.training import health, optim
from dino_jax.training.state import TrainState, initializer
from dino_jax.training.step import StepSettings, train_step
from dino_jax.training.views import make_views

pytestmark = pytest.mark.usefixtures("all_optimizations")  # takes a thousand steps
STEPS, WARMUP, INTERVAL = 240, 40, 40
K = 256
GOOD = {"center_momentum": 0.9, "teacher_temp": 0.04, "momentum_teacher": 0.99}
Run = Callable[..., list[health.Verdict]]


@pytest.fixture(scope="module")
def run() -> Run:
    """A function that trains a tiny network and returns the verdict on every interval.

    Its settings are arguments of a single compiled step.
    """
    config = default.get_config("debug")
    config.optim.lr, config.train.batch_size = 0.004, 32
    network, init = initializer(
        build.model_spec(config).model,
        tx := optim.make_optimizer("adamw", clip_grad=3.0, norm_last_layer=True),
        num_prototypes=K,
    )
    records = Records(open_source("shapes:512@train"))
    batches = train_batches(
        records, batch_size=32, seed=0, start_step=0, canvas_size=64, num_threads=2
    )
    batches = list(itertools.islice(batches, 64))
    schedules = build.make_schedules(config, steps_per_epoch=WARMUP)
    base = StepSettings(
        network=network,
        tx=tx,
        make_views=partial(make_views, seed=0, crops=build.crop_settings(config)),
        **schedules,
        steps_per_epoch=16,
        freeze_steps=16,
        log_every=INTERVAL,
    )

    @partial(jax.jit, donate_argnums=0)
    def step_fn(state: TrainState, batch: dict[str, Any], knobs: dict[str, float]) -> TrainState:
        step_settings = dataclasses.replace(
            base,
            center_momentum=knobs["center_momentum"],
            teacher_temp=lambda step: knobs["teacher_temp"],
            momentum=lambda step: knobs["momentum_teacher"],
            lr=lambda step: (
                knobs["lr"] * (step + 1) / WARMUP * (step < WARMUP) + knobs["lr"] * (step >= WARMUP)
            ),
        )
        return train_step(state, batch, settings=step_settings)

    def train(**changes: float) -> list[health.Verdict]:
        knobs = GOOD | {"lr": 0.001} | changes
        state, verdicts = jax.jit(init)(jax.random.key(0)), []
        for step, batch in zip(range(1, STEPS + 1), itertools.cycle(batches), strict=False):
            state = step_fn(state, batch, knobs)
            if step % INTERVAL == 0:
                metrics = {k: float(v) for k, v in health.summarize(state).items()}
                verdicts.append(
                    health.assess(metrics, num_prototypes=K, step=step, warmup_steps=WARMUP)
                )
        return verdicts

    return train


def test_a_healthy_run_is_learning(run: Run) -> None:
    assert [v.kind for v in run()] == ["starting"] * 2 + ["learning"] * 4


def test_a_slow_center_collapses_to_one_prototype(run: Run) -> None:
    last = run(center_momentum=0.999)[-1]
    assert last.kind == "one prototype"
    assert "loss.center_momentum" in last.text


def test_a_hot_teacher_collapses_to_the_uniform_distribution(run: Run) -> None:
    last = run(teacher_temp=0.08)[-1]
    assert last.kind == "uniform"
    assert "loss.teacher_temp" in last.text


def test_a_teacher_that_copies_the_student_is_collapsing(run: Run) -> None:
    verdicts = run(momentum_teacher=0.0, lr=0.002)
    assert [v.kind for v in verdicts[2:]] == ["unstable"] * 4
    assert "optim.momentum_teacher" in verdicts[-1].text
