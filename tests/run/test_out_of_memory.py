"""What is said, and what is kept, when the memory of a device does not do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from dino_jax import train
from dino_jax.config.file import override, read_config
from dino_jax.errors import UsageError
from dino_jax.memory import is_out_of_memory
from dino_jax.models.remat import POLICIES
from dino_jax.run.loop import train_loop
from dino_jax.run.out_of_memory import (
    ACTIVATIONS,
    FRACTIONS,
    MemoryGuard,
    Need,
    answer,
    predicted,
    remedies,
)
from dino_jax.run.plan import Plan
from tests.support import runs

GIB = 1 << 30
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."


def paper(**changes: object) -> ConfigDict:
    """ViT-S/16 with 512 images a step."""
    config = read_config(f"{runs.ROOT}/configs/vit_small.py")
    override(config, [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()])
    return config


def need(step: float | None, *, limit: float | None = 100, state: float = 2) -> Need:
    """In GiB; half a GiB of weights."""
    sizes = [None if size is None else int(size * GIB) for size in (limit, step)]
    return Need(int(state * GIB), GIB // 2, *sizes)


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        (EXHAUSTED, True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", True),
        ("INTERNAL: Failed to load: CUDA_ERROR_OUT_OF_MEMORY", True),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_what_is_out_of_memory(message: str, is_one: bool) -> None:
    assert is_out_of_memory(jax.errors.JaxRuntimeError(message)) == is_one
    assert not is_out_of_memory(RuntimeError(message))


def test_every_policy_has_its_share() -> None:
    assert list(ACTIVATIONS) == list(POLICIES)
    assert sorted(ACTIVATIONS.values(), reverse=True) == list(ACTIVATIONS.values())
    assert ACTIVATIONS["none"] == 1


# 2 GiB of state, three times half a GiB of weights, 128 of activations; 8 devices.
@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        ({}, 2 + 1.5 + 128),
        ({"train.batch_size": 128}, 2 + 1.5 + 32),
        ({"optim.accumulation_steps": 4}, 2 + 1.5 + 32),
        ({"model.remat": "dots"}, 2 + 1.5 + 128 * ACTIVATIONS["dots"]),
        ({"train.sharding": "fsdp"}, 2 / 8 + 1.5 + 128),
    ],
)
def test_what_a_change_is_expected_to_save(changes: dict[str, Any], gib: float) -> None:
    assert predicted(paper(), need(129.5), 8, changes) == pytest.approx(gib * GIB)


def test_changes_that_fit_are_the_smallest() -> None:
    config = paper(train__batch_size=512)
    found = list(remedies(config, need(180), 8))
    assert found == [
        "--config.model.remat=dots",
        "--config.optim.accumulation_steps=2",
        "--config.train.batch_size=256 (another run: in a new workdir)",
    ]
    for change in found:
        key, value = change.removeprefix("--config.").split(" ")[0].split("=")
        changed = {key: int(value) if value.isdigit() else value}
        assert predicted(config, need(180), 8, changed) < 100 * GIB
    assert predicted(config, need(180), 8, {"train.batch_size": 264}) * 1.05 > 100 * GIB
    # With the margin neither dots nor two passes would do.
    assert list(remedies(config, need(201), 8))[:2] == [
        "--config.model.remat=full",
        "--config.optim.accumulation_steps=4",
    ]


def test_a_state_that_is_too_large_is_spread() -> None:
    found = list(remedies(paper(), need(10, state=95), 8))
    assert "--config.train.sharding=fsdp" in found
    assert not any("fsdp" in change for change in remedies(paper(), need(10, state=95), 1))
    spread = paper(train__sharding="fsdp")
    assert not any("fsdp" in change for change in remedies(spread, need(10, state=95), 8))


def test_a_gpu_can_lend_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    lent = "the environment variable XLA_CLIENT_MEM_FRACTION=0.95"
    assert lent not in remedies(paper(), need(120), 1)  # here is none
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert list(remedies(paper(), need(120), 1))[-1] == lent
    assert lent not in remedies(paper(), need(130), 1)
    for name in FRACTIONS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.75")
            assert lent not in remedies(paper(), need(120), 1)


@pytest.mark.parametrize(
    "known", [need(80), need(80, limit=None), need(None), need(None, limit=None)]
)
def test_a_run_that_fails_within_its_plan_is_to_take_half(known: Need) -> None:
    """Another process may hold the memory, or the backend tells neither limit nor plan."""
    found = list(remedies(paper(), known, 1))
    assert found
    (batch,) = [change for change in found if "batch_size" in change]
    assert 150 < int(batch.split("=")[1].split(" ")[0]) <= 256


def test_nothing_fits() -> None:
    said = answer(paper(), need(10, state=2000), 8)
    assert "of 100.00 GiB. No single change would fit: combine --config.model.remat=full" in said


def test_the_answer_is_one_line() -> None:
    said = answer(paper(), need(201), 8)
    assert said.startswith(
        "the memory of a device does not do: per device 2.00 GiB of state and 201.00 GiB more in a "
        "step, of 100.00 GiB. Each of these would fit, by estimate: --config.model.remat=full; "
    )
    assert "\n" not in said


def test_a_plan_that_cannot_fit_is_refused_before_it_runs() -> None:
    class Planned:
        argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 2 * GIB
        temp_size_in_bytes = 200 * GIB

        def memory_analysis(self) -> "Planned":
            return self

    guard = MemoryGuard(paper(), need(None), 8)
    with guard, pytest.raises(UsageError, match=r"200\.00 GiB more in a step, of 100\.00 GiB"):
        guard.plan(Planned())
    with (
        pytest.raises(UsageError, match=r"per device 101\.00 GiB of state, of 100\.00 GiB"),
        MemoryGuard(paper(), need(None, state=101), 8),
    ):
        raise AssertionError("entered")


def test_other_errors_pass() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), guarded():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def guarded() -> MemoryGuard:
    return MemoryGuard(paper(), need(10), 8)


@pytest.mark.parametrize(
    ("when", "kept"),
    [("making the state", []), ("in the first step", []), ("after checkpoints", [4, 5])],
)
def test_a_run_that_runs_out_of_memory(
    when: str, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to change and keeps its checkpoints, from which it continues."""
    good = iter([True] * 6 if kept else [])

    def fail(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    def loop(state: Any, step_fn: Callable, *args: Any, **settings: Any) -> Any:
        def step(*arguments: Any) -> Any:
            after = step_fn(*arguments)  # a step that fails has taken the state
            return after if next(good, False) else fail()

        return train_loop(state, step, *args, **settings)

    config = runs.tiny_config()
    with monkeypatch.context() as patch:
        if when == "making the state":
            patch.setattr(Plan, "first_state", fail)
        patch.setattr(train, "train_loop", loop)
        with pytest.raises(
            UsageError, match=r"does not do: per device .*--config\.model\.remat=full"
        ):
            runs.train_here(config, tmp_path)
    assert runs.steps(tmp_path) == kept
    if kept:
        runs.train_here(config, tmp_path)
        runs.assert_equal(tmp_path, runs.whole())
