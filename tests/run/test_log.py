"""The log files and console lines that a run writes."""

import io
import json
import logging
import math
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.run import log as run_log
from dino_jax.run.learning_curve import plot_learning_curve
from tests.support.run_logs import BATCH, EPOCHS, open_log, records, scalars, train


def test_log_txt_has_the_reference_format(tmp_path: Path) -> None:
    train(tmp_path)
    epochs = records(tmp_path / "log.txt")
    loss = float(np.float32(6 - 10 / 7))
    first = {"train_loss": loss, "train_lr": 0.01, "train_wd": 0.04, "train_kl": 0.5, "epoch": 0}
    assert epochs[0] == first
    assert epochs[1]["knn_20_top1"] == 70.0
    assert epochs[1]["knn_20_top5"] == 90.0
    assert [record["epoch"] for record in epochs] == list(range(EPOCHS))


def test_intervals_have_metrics_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "_peak_device_memory", lambda: {"device_memory_gib": 1.25})
    with open_log(tmp_path, resume_step=2) as log:
        log.set_planned_memory(3 << 29)
        log.interval(4, {"loss": 3.0, "lr": 0.1}, seconds=0.5, data_seconds=0.1)
        line = (tmp_path / "metrics.jsonl").read_text()  # written before the run ends
        log.interval(10, {"loss": 2.0, "lr": 0.2}, seconds=2.0, data_seconds=0.0)
    assert json.loads(line) == {
        "step": 4,
        "epoch": 0.4,
        "loss": 3.0,
        "lr": 0.1,
        "images_per_second": 2 * BATCH / 0.5,
        "data_wait": 0.2,
        "seconds": 0.5,
        "planned_memory_gib": 1.5,
        "device_memory_gib": 1.25,
    }
    assert records(tmp_path / "metrics.jsonl")[1]["images_per_second"] == 6 * BATCH / 2.0


def test_device_memory_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": n << 30}) for n in (3, 5, 4)]
    monkeypatch.setattr(run_log.jax, "local_devices", lambda: devices)
    assert run_log._peak_device_memory() == {"device_memory_gib": 5.0}
    devices[:] = [Device(None)]
    train(tmp_path)
    assert not any("device_memory_gib" in record for record in records(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("killed_at", "resume_step"), [(8, 0), (10, 8), (10, 10), (15, 10), (29, 4), (40, 20)]
)
def test_resumed_run_writes_the_same_log(
    tmp_path: Path, killed_at: int, resume_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "plot_learning_curve", lambda workdir: None)  # slow
    train(tmp_path / "whole")
    train(tmp_path / "killed", stop_step=killed_at)
    for name in ("log.txt", "metrics.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 30, "epoch": 3, "train_l')  # killed while writing
    train(tmp_path / "killed", resume_step)
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    assert (resumed / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    # The times are fake and every resume step ends an interval, so these files are equal too.
    expected = (whole / "metrics.jsonl").read_bytes()
    assert (resumed / "metrics.jsonl").read_bytes() == expected
    assert not list(resumed.glob("*.tmp"))


def test_resume_drops_records_that_will_be_rewritten(tmp_path: Path) -> None:
    train(tmp_path)
    with open_log(tmp_path, resume_step=20):
        assert [r["epoch"] for r in records(tmp_path / "log.txt")] == [0, 1]
        assert [r["step"] for r in records(tmp_path / "metrics.jsonl")][-1] == 20
    with open_log(tmp_path, resume_step=19):
        assert [r["epoch"] for r in records(tmp_path / "log.txt")] == [0]
        assert [r["step"] for r in records(tmp_path / "metrics.jsonl")][-1] == 16


def test_a_kill_while_dropping_records_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    before = (tmp_path / "log.txt").read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, resume_step=10)
    assert (tmp_path / "log.txt").read_bytes() == before


def test_rejects_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text('{"epoch": 0}\nepoch 1\n{"epoch": 2}\n')
    with pytest.raises(UsageError, match=r"log\.txt, line 2 is not JSON"):
        train(tmp_path, resume_step=30)


@pytest.mark.parametrize(
    ("name", "line", "key"),
    [
        ("log.txt", '{"train_loss": 6.0}', "epoch"),
        ("log.txt", '{"epoch": null}', "epoch"),
        ("metrics.jsonl", '{"epoch": 0.5, "loss": 6.0}', "step"),
        ("metrics.jsonl", '{"step": 5, "loss": 6.0}', "epoch"),
        ("metrics.jsonl", "[1, 2]", "step"),
    ],
)
def test_rejects_a_line_without_its_keys(name: str, line: str, key: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"step": 1, "epoch": 0}}\n{line}\n')
    message = rf"{name}, line 2 must contain a number '{key}', .*: fix or delete the line"
    with pytest.raises(UsageError, match=message):
        train(tmp_path, resume_step=30)
    with pytest.raises(UsageError, match=message):
        plot_learning_curve(tmp_path)


def test_a_new_run_renames_the_logs_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_log, "plot_learning_curve", lambda workdir: None)  # slow
    for stop_step in (8, 10, 20, 40):
        train(tmp_path, stop_step=stop_step)
    # The first run finished no epoch.
    renamed = f"{tmp_path}/log.txt.1 and {tmp_path}/metrics.jsonl.1"
    assert f"renamed the logs of an earlier run to {renamed}" in capfd.readouterr().err
    for suffix, stop_step in (("", 40), (".1", 10), (".2", 20)):
        assert len(records(tmp_path / f"log.txt{suffix}")) == stop_step // 10
        assert records(tmp_path / f"metrics.jsonl{suffix}")[-1]["step"] == stop_step
    assert not (tmp_path / "log.txt.3").exists()


def test_nan_and_infinities_are_written_as_null(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        values = {"loss": math.nan, "lr": 0.1, "kl": -jnp.inf}
        log.interval(10, values, seconds=1.0, data_seconds=0.0)
        log.epoch(0, values)
    for name in ("log.txt", "metrics.jsonl"):
        (record,) = records(tmp_path / name)
        assert [v for k, v in record.items() if k.endswith(("loss", "kl"))] == [None, None]
    assert {tag for tag, _ in scalars(tmp_path) if tag.startswith("train/")} == {"train/lr"}
    train(tmp_path, resume_step=12)  # can read null
    assert records(tmp_path / "log.txt")[0]["train_loss"] is None


def test_only_the_main_process_writes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with open_log(tmp_path / "run", is_main=False) as log:
        log.interval(5, {"loss": 1.0, "lr": 0.1}, seconds=1.0, data_seconds=0.0)
        log.epoch(0, {"loss": 1.0})
        log.scores(0, {20: {"top1": 40.0}})
        log.message("not printed")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_lines_are_rate_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_log, "_peak_device_memory", lambda: {"device_memory_gib": 8.06})
    with open_log(tmp_path) as log:
        for step in range(1, 41):
            values = {"loss": 6.5, "lr": 3e-4}
            log.interval(step, values, seconds=90.0, data_seconds=4.5)
            now[0] += 3
        log.message("a warning")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == (
        "epoch 0.10/4  loss 6.500  lr 3.0e-04  0 images/s  wait 5%  8.1 GiB  ETA 58:30"
    )
    # Every fourth of the intervals, since ten seconds are not over before, and the last.
    shown = [float(line.split()[1].split("/")[0]) for line in lines[:-1]]
    assert shown == pytest.approx([step / 10 for step in (*range(1, 41, 4), 40)])
    assert lines[-1] == "a warning"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_messages_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])
    with open_log(tmp_path, resume_step=10) as log:
        log.interval(20, {"loss": 6.5, "lr": 3e-4}, seconds=1.0, data_seconds=0.25)
        logging.warning("a picture")
        log.message("a warning")
        log.epoch(1, {"loss": 6.25}, {20: {"top1": 55.04, "top5": 90.0}})
    text = terminal.getvalue()
    bar = "epoch 2.00/4 loss 6.500 lr 3.0e-04 320 images/s wait 25% ETA 00:02"
    # The message starts on a cleared line, and the bar is drawn again below it.
    for message in ("a picture\n", "a warning\n"):
        before, after = text.split(message)
        assert bar in before
        assert before.endswith("\r")
        assert bar in after
    assert "epoch 2 finished  loss 6.2500  k-NN (k=20) 55.0 %\n" in after
