"""Signals before a job runs: one line and a shell's code, from a process that has only begun to load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from horovod_jobs import early

# What loads is this: it has sent itself the signal before it is there.
PROGRAM = """
import os, sys
class Loading:
    def find_spec(self, name, path=None, target=None):
        if name == "hydra":
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Loading())
from horovod_jobs.__main__ import main
main()
"""


def loading(number: int, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **env},
        # What starts the tests may run beside a shell, which has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_while_the_program_loads_is_one_line(number: signal.Signals, code: int, name: str) -> None:
    done = loading(number)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines() == [f"error: {early.said(number)}"]
    assert name in done.stderr
    assert done.stdout == ""


def test_of_ranks_the_first_one_speaks() -> None:
    done = loading(signal.SIGTERM, OMPI_COMM_WORLD_RANK="1")
    assert (done.returncode, done.stderr) == (143, "")


def test_what_is_ignored_stays_so_and_a_launchers_ranks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        monkeypatch.setenv(early.COMMAND_VARIABLE, "[]")
        early.arm()
        assert {number: signal.getsignal(number) for number in before} == before
        monkeypatch.delenv(early.COMMAND_VARIABLE)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        early.arm()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        early.disarm(outlived=False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (before[signal.SIGTERM], signal.SIG_DFL)
        early.disarm(outlived=True)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
