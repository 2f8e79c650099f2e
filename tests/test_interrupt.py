"""Ctrl-C and SIGTERM as a request."""

import os
import signal

import pytest

from dino_jax.interrupt import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_first_signal_is_a_request(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.agreed(1, every=2)
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.agreed(1, every=2)
    assert stop.signal_name == name
    assert f"{name}: saves after this step; again to stop at once" in capfd.readouterr().err


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
