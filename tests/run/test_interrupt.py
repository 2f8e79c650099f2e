"""Signals as stop requests."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dino_jax.run.interrupt import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_first_signal_requests_a_stop(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.should_stop(1, every=(2,))
        signal.raise_signal(signal.Signals[name])
        assert stop.should_stop(1, every=(2,))
    assert stop.signal_name == name
    repeat = "; repeat to stop immediately" if name in ("SIGINT", "SIGTERM") else ""
    assert capfd.readouterr().err == f"\n{name}: saving after this step{repeat}\n"


def test_terminals_and_schedulers_may_send_several_signals() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
    assert stop.signal_name == "SIGHUP"


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
        assert stop.signal_name is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_other_threads_install_no_handlers() -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    during = []

    def enter() -> None:
        with StopRequest() as stop:
            during.extend(signal.getsignal(number) for number in StopRequest.SIGNALS)
            assert not stop.should_stop(1, every=(2,))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert during == before


def test_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with StopRequest() as stop, monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal_name == "SIGTERM"


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
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_restores_handlers(signals: list[signal.Signals]) -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
        for number in signals:
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
