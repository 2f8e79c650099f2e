"""What the loop logs and saves, also when a run is interrupted."""

import errno
import json
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dino_jax import train
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.run import loop
from dino_jax.run.log import RunLog
from dino_jax.run.loop import TrainingDiverged
from dino_jax.run.online_knn import OnlineKnn
from dino_jax.training.state import TrainState
from tests.support import runs

SCORES = {5: {"top1": 40.0, "top5": 80.0}}


def test_intervals_continue_after_a_stop_and_a_short_last_interval_is_logged(
    tmp_path: Path,
) -> None:
    config = runs.tiny_config()
    runs.train_here(config, tmp_path, stop_after=runs.TOTAL_STEPS - 2)
    assert runs.records(tmp_path)[-1]["step"] == 12
    result = runs.train_here(config, tmp_path)
    assert runs.records(tmp_path) == runs.records(runs.whole())
    found, epochs = runs.records(tmp_path), runs.records(tmp_path, "log.txt")
    of_steps = np.diff([0, *(record["step"] for record in found)])
    mean = np.average([record["loss"] for record in found], weights=of_steps)
    assert mean == pytest.approx(np.mean([epoch["train_loss"] for epoch in epochs]), rel=1e-5)
    *_, whole, last = found
    assert (whole["step"], last["step"]) == (14, runs.TOTAL_STEPS)
    assert result["health"] == last["health"]


def test_postponed_scores_do_not_count_as_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = []

    def score(*_: Any) -> dict[int, dict[str, float]]:
        passed.append(1000.0)
        return SCORES

    def clock() -> float:
        return time.perf_counter() + sum(passed)

    config = runs.tiny_config(eval__knn_every_epochs=1, checkpoint__every_steps=0)
    runs.train_here(config, tmp_path, stop_after=runs.STEPS_PER_EPOCH)
    monkeypatch.setattr(OnlineKnn, "__call__", score)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock))
    runs.train_here(config, tmp_path)
    assert [record["knn_5_top1"] for record in runs.records(tmp_path, "log.txt")] == [40.0] * 3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["seconds"] for line in lines) < 1000


def test_logged_epoch_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interval(self: RunLog, step: int, *args: Any, **values: Any) -> None:
        if step > runs.STEPS_PER_EPOCH:
            raise runs.KilledError
        write(self, step, *args, **values)

    write = RunLog.interval
    monkeypatch.setattr(OnlineKnn, "__call__", lambda *_: SCORES)
    config = runs.tiny_config(eval__knn_every_epochs=1, checkpoint__every_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "interval", interval)
        with pytest.raises(runs.KilledError):
            runs.train_here(config, tmp_path)
    assert runs.steps(tmp_path)[-1] == runs.STEPS_PER_EPOCH
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line)["knn_5_top1"] == 40.0

    config.eval.knn_every_epochs = 0
    runs.train_here(config, tmp_path)
    after = (tmp_path / "log.txt").read_text().splitlines()
    assert len(after) == 3
    assert after[0] == line


def test_first_epoch_is_logged_after_its_checkpoint_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run killed right after this log line would start over."""

    def epoch(self: RunLog, number: int, *args: Any) -> None:
        saved.append(runs.steps(tmp_path)[-1])
        write(self, number, *args)

    saved, write = [], RunLog.epoch
    monkeypatch.setattr(RunLog, "epoch", epoch)
    runs.train_here(runs.tiny_config(checkpoint__every_steps=0), tmp_path)
    assert saved[0] == 5


@pytest.mark.parametrize("every_steps", [0, 1])
def test_divergence_error_names_the_last_checkpoint(every_steps: int, tmp_path: Path) -> None:
    config = runs.tiny_config(
        optim__lr=1e25, optim__clip_grad=0, checkpoint__every_steps=every_steps, log__every_steps=1
    )
    checkpoint = r"of step \d is intact: load it" if every_steps else "there is no checkpoint yet"
    with pytest.raises(TrainingDiverged, match=checkpoint):
        runs.train_here(config, tmp_path)
    last = runs.records(tmp_path)[-1]
    assert (last["skipped_in_a_row"], last["loss"], last["health"]) == (3, None, "not finite")
    if every_steps:
        good = runs.arrays(tmp_path)
        assert all(np.isfinite(x).all() for name, x in good.items() if "params" in name)
        assert good["training['skipped_in_a_row']"] < 3


def test_state_at_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All earlier batches are freed, and TensorBoard has all intervals."""
    taken, alive, intervals = [], [], {}

    class Watched(DevicePrefetch):
        def __next__(self) -> dict[str, jax.Array]:
            batch = super().__next__()
            taken.append(weakref.ref(batch["canvas"]))
            return batch

    def save(self: RunCheckpoints, step: int, state: TrainState) -> None:
        alive.append([number for number, canvas in enumerate(taken, 1) if canvas() is not None])
        files = (tmp_path / "tensorboard").iterdir()
        intervals[step] = sum(path.read_bytes().count(b"train/kl") for path in files)

    monkeypatch.setattr(train, "DevicePrefetch", Watched)
    monkeypatch.setattr(RunCheckpoints, "save", save)
    runs.train_here(runs.tiny_config(), tmp_path)
    assert len(taken) == runs.TOTAL_STEPS
    assert alive == [[]] * 6
    assert intervals == {4: 2, 5: 2, 8: 4, 10: 5, 12: 6, 15: 8}


@pytest.mark.parametrize("diverged", [False, True])
def test_a_data_error_loses_no_finished_step(
    diverged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(DevicePrefetch):
        taken = 0

        def __next__(self) -> dict[str, jax.Array]:
            self.taken += 1
            if self.taken == 7:
                if diverged:
                    monkeypatch.setattr(loop, "_summary", lambda _: {"skipped_in_a_row": 3.0})
                raise OSError(errno.EIO, "Input/output error")
            return super().__next__()

    monkeypatch.setattr(train, "DevicePrefetch", Breaking)
    with pytest.raises(TrainingDiverged if diverged else OSError):
        runs.train_here(runs.tiny_config(), tmp_path)
    assert runs.steps(tmp_path)[-1] == (runs.STEPS_PER_EPOCH if diverged else 6)
    assert [record["step"] for record in runs.records(tmp_path)] == [2, 4, 6]
