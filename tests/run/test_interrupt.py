"""Ctrl-C and SIGTERM as a request."""

import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dino_jax.run.interrupt import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_first_signal_is_a_request(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.agreed(1, every=(2,))
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.agreed(1, every=(2,))
    assert stop.signal_name == name
    assert f"{name}: saves after this step; again to stop at once" in capfd.readouterr().err


def test_several_hosts_confer_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    conferred = []

    def gather(mine: np.ndarray) -> np.ndarray:
        conferred.append(bool(mine))
        return np.array([mine, True])  # the other one has had a signal

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    stop = StopRequest()
    agreed = [step for step in range(1, 25) if stop.agreed(step, every=(10, 7))]
    assert agreed == [7, 10, 14, 20, 21]
    assert conferred == [False] * 5


def test_second_ctrl_c_acts_as_usual() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_leaves_handlers_as_they_were(signals: list[signal.Signals]) -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
        for number in signals:
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
