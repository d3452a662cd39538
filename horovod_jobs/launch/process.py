"""Run a launcher's command: signals go to its ranks, its exit code is the job's, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType

from horovod_jobs.launch.base import LaunchPlan
from horovod_jobs.launch.in_rank import DIRECTORY_VARIABLE


def run_world(planned: LaunchPlan, *, grace_s: float) -> int:
    """Start the launcher in a session of its own, pass signals to its ranks, and give the job's exit code."""
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-") as directory:
        process = subprocess.Popen(
            planned.argv,
            env={**planned.env, DIRECTORY_VARIABLE: directory},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        stopper = _Stopper(process, Path(directory), grace_s=grace_s)
        before = {number: signal.signal(number, stopper) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = stopper.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _kill_group(process)
        recorded = [int(path.read_text()) for path in sorted(Path(directory).glob("exit-*"))]
    failed = [value for value in recorded if value]
    if not failed and code and stopper.asked:
        return 128 + stopper.asked  # Ended by force before a rank could tell its code.
    return failed[0] if failed else (128 - code if code < 0 else code)


def _die_with_parent() -> None:
    # A killed parent must not leave ranks behind: the kernel then ends mpirun, and mpirun its ranks. Linux only.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


class _Stopper:
    """A signal handler that asks the ranks to stop, then insists."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, *, grace_s: float) -> None:
        self._process, self._directory, self._grace_s = process, directory, grace_s
        self._deadline: float | None = None
        self.asked = 0  # the first signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first = self._deadline is None
        self.asked = self.asked or int(number)
        self._deadline = time.monotonic() + (self._grace_s if first else 0.0)
        for path in self._directory.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.name.split("-")[1]), number)
        if first and not any(self._directory.glob("pid-*")):
            self._deadline = time.monotonic()  # No rank listens yet.

    def wait(self) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=0.2)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=10)
                _kill_group(self._process)
                return self._process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
