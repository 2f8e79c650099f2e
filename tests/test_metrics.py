"""The files, console lines and picture that a run leaves behind."""

import io
import json
import logging
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dino_jax import metrics
from dino_jax.errors import UsageError
from dino_jax.learning_curve import plot_learning_curve
from dino_jax.metrics import RunLog, is_logged

STEPS_PER_EPOCH, EPOCHS, BATCH = 10, 4, 32


def open_log(workdir: Path, resume_step: int = 0, **changes: Any) -> RunLog:
    settings = {
        "resume_step": resume_step,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": EPOCHS * STEPS_PER_EPOCH,
        "batch_size": BATCH,
    }
    return RunLog(workdir, **(settings | changes))


def train(workdir: Path, resume_step: int = 0, stop_step: int = EPOCHS * STEPS_PER_EPOCH) -> None:
    """A run whose numbers depend on the step alone; an interval is 4 steps or ends an epoch."""
    with open_log(workdir, resume_step) as log:
        if resume_step == 0:
            log.scores(0, {20: {"top1": 40.0, "top5": 80.0}})
        first = resume_step or 1  # the line of an epoch that ends there may be lacking
        for step in range(first, stop_step + 1):
            loss, lr = jnp.float32(6 - step / 7), np.float64(0.1 / step)
            if step > resume_step and (step % 4 == 0 or step % STEPS_PER_EPOCH == 0):
                log.interval(
                    step,
                    {"loss": loss, "lr": lr, "kl": 1 / step},
                    seconds=0.5,
                    data_seconds=0.1,
                )
            if step % STEPS_PER_EPOCH == 0:
                epoch = step // STEPS_PER_EPOCH - 1
                if step == resume_step and is_logged(workdir, epoch):
                    continue
                knn = {20: {"top1": 50.0 + step, "top5": 90.0}} if epoch % 2 else None
                log.epoch(epoch, {"loss": loss, "lr": lr, "weight_decay": 0.04, "kl": 0.5}, knn)


def records(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(workdir: Path) -> Iterator[Event]:
    """TensorBoard's files: length, its checksum, the message, its checksum."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
    return {(v.tag, e.step): v.simple_value for e in events(workdir) for v in e.summary.value}


def test_log_txt_is_what_users_of_the_reference_parse(tmp_path: Path) -> None:
    train(tmp_path)
    epochs = records(tmp_path / "log.txt")
    loss = float(np.float32(6 - 10 / 7))
    first = {"train_loss": loss, "train_lr": 0.01, "train_wd": 0.04, "train_kl": 0.5, "epoch": 0}
    assert epochs[0] == first
    assert epochs[1]["knn_20_top1"] == 70.0
    assert epochs[1]["knn_20_top5"] == 90.0
    assert [record["epoch"] for record in epochs] == list(range(EPOCHS))


def test_intervals_hold_metrics_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_peak_device_memory", lambda: {"device_memory_gib": 1.25})
    with open_log(tmp_path, resume_step=2) as log:
        log.note_memory(3 << 29)
        log.interval(4, {"loss": 3.0, "lr": 0.1}, seconds=0.5, data_seconds=0.1)
        line = (tmp_path / "metrics.jsonl").read_text()  # there before the run ends
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


def test_memory_is_left_out_where_the_backend_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": n << 30}) for n in (3, 5, 4)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    assert metrics._peak_device_memory() == {"device_memory_gib": 5.0}
    devices[:] = [Device(None)]
    train(tmp_path)
    assert not any("device_memory_gib" in record for record in records(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("killed_at", "resume_step"), [(8, 0), (10, 8), (10, 10), (15, 10), (29, 4), (40, 20)]
)
def test_a_resumed_run_leaves_the_same_log(
    tmp_path: Path, killed_at: int, resume_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "plot_learning_curve", lambda workdir: None)  # slow
    train(tmp_path / "whole")
    train(tmp_path / "killed", stop_step=killed_at)
    for name in ("log.txt", "metrics.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 30, "epoch": 3, "train_l')  # killed while writing
    train(tmp_path / "killed", resume_step)
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    assert (resumed / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    # Times are fixed here and every resume step ends an interval, so even these are the same.
    expected = (whole / "metrics.jsonl").read_bytes()
    assert (resumed / "metrics.jsonl").read_bytes() == expected
    assert not list(resumed.glob("*.tmp"))


def test_resume_keeps_only_what_is_not_written_again(tmp_path: Path) -> None:
    train(tmp_path)
    with open_log(tmp_path, resume_step=20):
        assert [r["epoch"] for r in records(tmp_path / "log.txt")] == [0, 1]
        assert [r["step"] for r in records(tmp_path / "metrics.jsonl")][-1] == 20
    with open_log(tmp_path, resume_step=19):
        assert [r["epoch"] for r in records(tmp_path / "log.txt")] == [0]
        assert [r["step"] for r in records(tmp_path / "metrics.jsonl")][-1] == 16


def test_a_kill_while_dropping_lines_loses_nothing(
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


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
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
def test_a_line_of_something_else_is_named(name: str, line: str, key: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"step": 1, "epoch": 0}}\n{line}\n')
    message = rf"{name}, line 2 has no number '{key}', as every .* mend the line or delete it"
    with pytest.raises(UsageError, match=message):
        train(tmp_path, resume_step=30)
    with pytest.raises(UsageError, match=message):
        plot_learning_curve(tmp_path)


def test_a_new_run_sets_the_logs_of_another_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "plot_learning_curve", lambda workdir: None)  # slow
    for stop_step in (8, 10, 20, 40):
        train(tmp_path, stop_step=stop_step)
    # The first one finished no epoch.
    said = f"logs of a former run are now {tmp_path}/log.txt.1 and {tmp_path}/metrics.jsonl.1"
    assert said in capfd.readouterr().err
    for suffix, stop_step in (("", 40), (".1", 10), (".2", 20)):
        assert len(records(tmp_path / f"log.txt{suffix}")) == stop_step // 10
        assert records(tmp_path / f"metrics.jsonl{suffix}")[-1]["step"] == stop_step
    assert not (tmp_path / "log.txt.3").exists()


def test_tensorboard_has_the_scalars_of_both_files(tmp_path: Path) -> None:
    train(tmp_path, resume_step=10)
    found = scalars(tmp_path)
    assert found["train/kl", 16] == pytest.approx(1 / 16)
    assert found["speed/data_wait", 16] == pytest.approx(0.2)
    assert found["epoch/train_wd", 20] == pytest.approx(0.04)
    assert found["epoch/knn_20_top1", 40] == pytest.approx(90.0)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [11]  # TensorBoard hides what a former run wrote from this step on


def test_tensorboard_holds_an_epoch_whose_line_is_written(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.epoch(0, {"loss": 6.0, "lr": 0.1})
        assert scalars(tmp_path)["epoch/train_loss", 10] == 6.0


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        values = {"loss": math.nan, "lr": 0.1, "kl": -jnp.inf}
        log.interval(10, values, seconds=1.0, data_seconds=0.0)
        log.epoch(0, values)
    for name in ("log.txt", "metrics.jsonl"):
        (record,) = records(tmp_path / name)
        assert [v for k, v in record.items() if k.endswith(("loss", "kl"))] == [None, None]
    assert {tag for tag, _ in scalars(tmp_path) if tag.startswith("train/")} == {"train/lr"}
    train(tmp_path, resume_step=12)  # and null is read back
    assert records(tmp_path / "log.txt")[0]["train_loss"] is None


def test_only_the_main_process_writes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with open_log(tmp_path / "run", is_main=False) as log:
        log.interval(5, {"loss": 1.0, "lr": 0.1}, seconds=1.0, data_seconds=0.0)
        log.epoch(0, {"loss": 1.0})
        log.scores(0, {20: {"top1": 40.0}})
        log.message("nobody hears this")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_a_plain_console_gets_lines_at_a_sensible_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "_peak_device_memory", lambda: {"device_memory_gib": 8.06})
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


def test_a_terminal_gets_a_bar_with_messages_above(
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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures in the order in which they were saved."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def record(self: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return figures


def test_the_learning_curve_shows_what_the_files_hold(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    train(tmp_path)
    (figure,) = drawn
    labels = ["loss (nats)", "learning rate", "KL(teacher || student) (nats)", "k-NN top-1 (%)"]
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    assert {axis.get_xlabel() for axis in figure.axes} == {"epoch"}
    intervals, epochs = figure.axes[0].lines
    held = records(tmp_path / "metrics.jsonl")[1:]
    np.testing.assert_array_equal(intervals.get_xdata(), [r["step"] / 10 for r in held])
    np.testing.assert_array_equal(intervals.get_ydata(), [r["loss"] for r in held])
    np.testing.assert_array_equal(epochs.get_xdata(), [0.5, 1.5, 2.5, 3.5])
    (knn,) = figure.axes[-1].lines
    assert (list(knn.get_xdata()), list(knn.get_ydata())) == ([0, 2, 4], [40, 70, 90])
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert min(picture.size) > 500


def test_the_learning_curve_of_one_poisoned_epoch(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    with open_log(tmp_path) as log:
        for step, loss in ((4, 6.0), (8, math.nan), (10, 5.0)):
            values = {"loss": loss, "lr": 0.1, "kl": math.inf}
            log.interval(step, values, seconds=1.0, data_seconds=0.0)
        log.epoch(0, {"loss": math.nan, "lr": 0.1})
    loss, lr, kl = drawn[0].axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [6.0, math.nan, 5.0])
    assert lr.lines[1].get_marker() == "o"  # a single point has no line
    assert [text.get_text() for text in kl.texts] == ["no finite value"]
    assert not loss.texts


def test_scores_of_the_untrained_network_are_drawn_before_anything_else(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.scores(0, {20: {"top1": 40.0, "top5": 80.0}})
    expected = {"step": 0, "epoch": 0.0, "knn_20_top1": 40.0, "knn_20_top5": 80.0}
    assert records(tmp_path / "metrics.jsonl") == [expected]
    assert scalars(tmp_path)["epoch/knn_20_top1", 0] == 40.0
    assert (tmp_path / "learning_curve.png").exists()


def test_the_learning_curve_of_a_running_or_killed_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "epoch": 0.5, "loss": 6.0}\n{"step": 6,')
    assert plot_learning_curve(tmp_path) == tmp_path / "learning_curve.png"
    assert (tmp_path / "learning_curve.png").exists()


def test_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path):
        pass
    assert not (tmp_path / "learning_curve.png").exists()
    with pytest.raises(UsageError, match="trained for at least one interval"):
        plot_learning_curve(tmp_path)
