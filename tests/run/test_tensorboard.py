"""The scalars that a run writes for TensorBoard."""

from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from tests.support.run_logs import events, open_log, scalars, train


def test_tensorboard_has_the_scalars_of_both_files(tmp_path: Path) -> None:
    train(tmp_path, resume_step=10)
    found = scalars(tmp_path)
    assert found["train/kl", 16] == pytest.approx(1 / 16)
    assert found["speed/data_wait", 16] == pytest.approx(0.2)
    assert found["epoch/train_wd", 20] == pytest.approx(0.04)
    assert found["epoch/knn_20_top1", 40] == pytest.approx(90.0)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [11]  # TensorBoard hides older events from this step on


def test_a_new_run_hides_all_older_events(tmp_path: Path) -> None:
    with open_log(tmp_path):
        pass
    assert [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START] == [0]


def test_an_epoch_is_flushed_immediately(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.epoch(0, {"loss": 6.0, "lr": 0.1})
        assert scalars(tmp_path)["epoch/train_loss", 10] == 6.0
