"""Schedules, compared with the reference's numbers and with NumPy."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dino_jax.training import schedules
from dino_jax.training.schedules import Schedule
from tests.conftest import parity_cases

CASES = [
    (path, name.removesuffix("_args"))
    for path in parity_cases("schedules*.npz")
    for name in np.load(path)
    if name.endswith("_args")
]


def evaluate(schedule: Schedule, steps: int) -> np.ndarray:
    """A schedule's values at every step, in the current precision."""
    return np.asarray(jax.vmap(schedule)(np.arange(steps, dtype=np.int32)))


@pytest.mark.parametrize(("path", "name"), CASES)
def test_cosine_equals_the_reference(path: Path, name: str) -> None:
    golden = np.load(path)
    base, final, epochs, steps_per_epoch, warmup_epochs = golden[f"{name}_args"].tolist()
    total = round(epochs * steps_per_epoch)
    arguments = {"total_steps": total, "warmup_steps": round(warmup_epochs * steps_per_epoch)}
    with jax.enable_x64(True):
        found = evaluate(schedules.cosine(base, final, **arguments), total)
    np.testing.assert_allclose(found, golden[name], rtol=1e-9)
    single = evaluate(schedules.cosine(base, final, **arguments), total)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, golden[name], rtol=2e-4, atol=1e-6 * base)


def test_the_warmup_starts_at_zero_and_ends_at_the_base() -> None:
    values = evaluate(schedules.cosine(0.5, 0.1, total_steps=30, warmup_steps=5), 30)
    np.testing.assert_allclose(values[:5], np.linspace(0, 0.5, 5), rtol=1e-6)
    assert values[5] == values[4] == 0.5
    assert 0.1 < values[-1] < 0.11


@pytest.mark.parametrize("warmup", [0, 1])
def test_short_warmups(warmup: int) -> None:
    values = evaluate(schedules.cosine(0.5, 0.1, total_steps=10, warmup_steps=warmup), 10)
    np.testing.assert_array_equal(values[:warmup], np.linspace(0, 0.5, warmup))
    assert values[warmup] == 0.5
    assert (np.diff(values[warmup:]) < 0).all()


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_of_at_least_the_whole_run_rises_until_the_end(warmup: int) -> None:
    values = evaluate(schedules.cosine(0.5, 0.1, total_steps=10, warmup_steps=warmup), 10)
    np.testing.assert_allclose(values, np.linspace(0, 0.5, warmup)[:10], rtol=1e-6)


def test_a_constant_schedule() -> None:
    values = evaluate(schedules.cosine(0.04, 0.04, total_steps=10), 10)
    np.testing.assert_allclose(values, 0.04, rtol=1e-7)


@pytest.mark.parametrize(
    ("warmup_epochs", "epochs"), [(0, 5), (1, 5), (2, 5), (5, 9), (5, 5), (30, 6)]
)
def test_teacher_temperature_equals_the_references_table(warmup_epochs: int, epochs: int) -> None:
    schedule = schedules.teacher_temperature(
        0.04, 0.07, warmup_epochs=warmup_epochs, steps_per_epoch=3
    )
    rest = max(epochs - warmup_epochs, 0)
    table = np.concatenate([np.linspace(0.04, 0.07, warmup_epochs), np.full(rest, 0.07)])[:epochs]
    values = evaluate(schedule, 3 * epochs)
    np.testing.assert_allclose(values, np.repeat(table, 3), rtol=1e-6)


def test_schedules_take_traced_and_plain_steps() -> None:
    for schedule in (
        schedules.cosine(0.5, 0.1, total_steps=30, warmup_steps=5),
        schedules.teacher_temperature(0.04, 0.07, warmup_epochs=4, steps_per_epoch=5),
    ):
        values = evaluate(schedule, 30)
        for step in (0, 4, 17):
            assert float(schedule(step)) == float(schedule(np.int64(step))) == values[step]
        np.testing.assert_array_equal(schedule(np.arange(30)), values)
