"""Ctrl-C and SIGTERM as stop requests."""

import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dino_jax.run.interrupt import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_first_signal_requests_a_stop(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.should_stop(1, every=(2,))
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.should_stop(1, every=(2,))
    assert stop.signal_name == name
    text = f"{name}: saving after this step; repeat to stop immediately"
    assert text in capfd.readouterr().err


def test_several_hosts_communicate_only_at_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def gather(mine: np.ndarray) -> np.ndarray:
        sent.append(bool(mine))
        return np.array([mine, True])  # the other host has received a signal

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    stop = StopRequest()
    stops = [step for step in range(1, 25) if stop.should_stop(step, every=(10, 7))]
    assert stops == [7, 10, 14, 20, 21]
    assert sent == [False] * 5


def test_second_ctrl_c_raises() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_restores_handlers(signals: list[signal.Signals]) -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
        for number in signals:
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
