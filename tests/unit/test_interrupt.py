"""Signals: noted whenever they come, and a second Ctrl-C ends at once."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from horovod_jobs.interrupt import StopRequest


class Struck(io.RawIOBase):
    """A stream in the middle of whose writes Ctrl-C is pressed."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return len(memoryview(data))  # type: ignore[arg-type]


def test_ctrl_c_in_the_middle_of_a_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.TextIOWrapper(io.BufferedWriter(Struck()))
    monkeypatch.setattr(sys, "stderr", stream)
    with StopRequest().installed() as stop:
        print("a line of the log", file=sys.stderr, flush=True)
    assert stop.code == 2
    assert "Press Ctrl-C again to stop at once." in capfd.readouterr().err


def test_ctrl_c_is_answered_once_where_the_launcher_does(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(told=True).installed() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.code == 2
    assert capfd.readouterr().err == ""


def test_a_second_ctrl_c_is_not_waited_for() -> None:
    with StopRequest().installed() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGUSR2, 2)])
def test_a_launchers_signals(number: signal.Signals, code: int) -> None:
    with StopRequest().installed() as stop:
        signal.raise_signal(number)
    assert stop.code == code
