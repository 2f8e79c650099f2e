"""Runs that need more memory than their devices have get advice, and keep their checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from dino_jax import train
from dino_jax.errors import UsageError
from dino_jax.memory import is_out_of_memory
from dino_jax.run.loop import train_loop
from dino_jax.run.out_of_memory import MemoryGuard, Need, advice
from dino_jax.run.plan import Plan
from tests.support import runs

GIB = 1 << 30
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."


def need(step: float | None, *, limit: float | None = 100, state: float = 2) -> Need:
    """Of a device, in GiB."""
    sizes = [None if size is None else int(size * GIB) for size in (limit, step)]
    return Need(int(state * GIB), *sizes)


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        (EXHAUSTED, True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", True),
        ("INTERNAL: Failed to load: CUDA_ERROR_OUT_OF_MEMORY", True),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_recognizes_out_of_memory_errors(message: str, is_one: bool) -> None:
    assert is_out_of_memory(jax.errors.JaxRuntimeError(message)) == is_one
    assert not is_out_of_memory(RuntimeError(message))


def test_advice_names_need_limit_and_settings() -> None:
    text = advice(need(201))
    assert text.startswith(
        "not enough device memory: per device 2.00 GiB for the state and 201.00 GiB during a step, "
        "100.00 GiB available. Set "
    )
    for key in ("model.remat", "optim.accumulation_steps", "train.sharding", "train.batch_size"):
        assert f"--config.{key}=" in text or f"--config.{key} " in text
    assert "\n" not in text


def test_rejects_a_run_that_cannot_fit_before_it_starts() -> None:
    class Planned:
        argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 2 * GIB
        temp_size_in_bytes = 200 * GIB

        def memory_analysis(self) -> "Planned":
            return self

    guard = MemoryGuard(need(None))
    with guard, pytest.raises(UsageError, match=r"200\.00 GiB during a step, 100\.00 GiB av"):
        guard.add_step(Planned())
    with (
        pytest.raises(UsageError, match=r"per device 101\.00 GiB for the state, 100\.00 GiB av"),
        MemoryGuard(need(None, state=101)),
    ):
        raise AssertionError("entered")


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), guarded():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def guarded() -> MemoryGuard:
    return MemoryGuard(need(10))


@pytest.mark.parametrize(
    ("when", "kept"),
    [("initial state", []), ("first step", []), ("after checkpoints", [4, 5])],
)
def test_run_out_of_memory(
    when: str, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the settings to change, and the run resumes from its checkpoints."""
    good = iter([True] * 6 if kept else [])

    def fail(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    def loop(state: Any, step_fn: Callable, *args: Any, **settings: Any) -> Any:
        def step(*arguments: Any) -> Any:
            after = step_fn(*arguments)  # the failing step has received the donated state
            return after if next(good, False) else fail()

        return train_loop(state, step, *args, **settings)

    config = runs.tiny_config()
    with monkeypatch.context() as patch:
        if when == "initial state":
            patch.setattr(Plan, "first_state", fail)
        patch.setattr(train, "train_loop", loop)
        with pytest.raises(
            UsageError, match=r"not enough device memory: per device .*--config\.model\.remat="
        ):
            runs.train_here(config, tmp_path)
    assert runs.steps(tmp_path) == kept
    if kept:
        runs.train_here(config, tmp_path)
        runs.assert_equal(tmp_path, runs.whole())
