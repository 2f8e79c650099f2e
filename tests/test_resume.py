"""A run that was killed, stopped, damaged or moved ends as if nothing had happened."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs


def seen(workdir: Path, pattern: str) -> Callable[[], bool]:
    """Whether the checkpoints' folder holds such an entry."""
    return lambda: any((workdir / "checkpoints").glob(pattern))


def logged(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether the metrics of a step are written."""
    log = workdir / "metrics.jsonl"
    return lambda: log.exists() and f'{{"step": {step},' in log.read_text()


def test_killed_at_any_moment_and_continued(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    command = runs.arguments(checkpoint__every_steps=2)
    moments = [
        seen(workdir, "2.*tmp*"),  # the first checkpoint is being written
        seen(workdir, "5.*tmp*"),  # the same at the end of an epoch
        logged(workdir, 8),
    ]
    with runs.started(workdir, *command) as process:
        for number, moment in enumerate(moments):
            runs.wait_until(moment, process)
            # A stopped process leaves on disk what a killed one would.
            process.send_signal(signal.SIGSTOP)
            shutil.copytree(workdir, tmp_path / f"killed_{number}")
            process.send_signal(signal.SIGCONT)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    # The same command continues, and ends in good order when interrupted.
    before = runs.steps(workdir)[-1]
    with runs.started(workdir, *command) as process:
        runs.wait_until(lambda: runs.steps(workdir)[-1] > before, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    stopped = runs.steps(workdir)[-1]
    assert before < stopped < runs.TOTAL_STEPS
    assert f"SIGINT: saved after step {stopped} of {runs.TOTAL_STEPS}" in output
    assert "the same command continues" in output

    for folder in [workdir, *tmp_path.glob("killed_*")]:
        runs.train_here(runs.tiny_config(), folder)
        runs.assert_equal(folder, runs.whole())
        assert not list((folder / "checkpoints").glob("*tmp*"))


def test_stopped_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    end = runs.STEPS_PER_EPOCH
    result = runs.train_here(runs.tiny_config(), tmp_path, stop_after=end)
    assert (result["step"], result["finished"]) == (end, False)
    # How images are read and what is kept may change.
    changed = runs.tiny_config(data__num_threads=5, checkpoint__keep_every_epochs=1)
    result = runs.train_here(changed, tmp_path)
    assert (result["step"], result["finished"]) == (runs.TOTAL_STEPS, True)
    assert runs.steps(tmp_path) == [5, 10, 12, 15]  # the two latest, and each epoch's
    runs.assert_equal(tmp_path, runs.whole())


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(runs.whole(), tmp_path, dirs_exist_ok=True)
    assert runs.train_here(runs.tiny_config(), tmp_path)["finished"]
    runs.assert_equal(tmp_path, runs.whole())


def test_another_number_of_devices_and_sharding(tmp_path: Path) -> None:
    config = runs.tiny_config()
    runs.train_here(config, tmp_path, devices=8, stop_after=4)
    config.train.sharding = "fsdp"
    runs.train_here(config, tmp_path, devices=4, stop_after=11)
    config.train.sharding = "dp"
    assert runs.train_here(config, tmp_path, devices=1)["finished"]

    for name in ("log.txt", "metrics.jsonl"):
        ours, theirs = runs.records(tmp_path, name), runs.records(runs.whole(), name)
        assert [r.keys() for r in ours] == [r.keys() for r in theirs]
        for key in ("loss", "train_loss", "teacher_entropy"):
            values = [[r[key] for r in records if key in r] for records in (ours, theirs)]
            np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


def test_newest_checkpoint_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs.train_here(runs.tiny_config(), tmp_path, stop_after=7)
    assert runs.steps(tmp_path) == [5, 7]
    data = (tmp_path / "checkpoints" / "7").rglob("teacher/**/d/*")
    largest = max(data, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    runs.train_here(runs.tiny_config(), tmp_path)
    warnings = [r.getMessage() for r in caplog.records if "step 7" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].endswith("trying the one before")
    runs.assert_equal(tmp_path, runs.whole())
