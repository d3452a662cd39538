"""Run a launcher's command: signals go to its ranks, its exit code is the job's, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from horovod_jobs import early
from horovod_jobs.errors import WorldError
from horovod_jobs.interrupt import tell_stopping
from horovod_jobs.launch.base import LaunchPlan
from horovod_jobs.launch.in_rank import DIRECTORY_VARIABLE, code_of_all

_LOOK_S = 0.1  # between two looks at the ranks
_LEAVE_S = 15.0  # for the ranks to end after one has failed: a stopped one never does, and mpirun may have been told to bear losses
_AGREED = (75, 130)  # Interrupted and InterruptedByUser: the ranks stopped in order.
# mpirun keeps its files in a directory named by its process id. One that was killed leaves them behind, and the next one with that id,
# which is soon in a container, ends with "listener thread failed to start". Open MPI 5 and 4 have these names for another place.
_SESSION_VARIABLES = ("PRTE_MCA_prte_local_tmpdir_base", "OMPI_MCA_orte_local_tmpdir_base")


def run_world(
    planned: LaunchPlan,
    *,
    grace_s: float,
    forward: Mapping[str, str] | None = None,
    directory: Path | None = None,
    recorded: bool = True,
) -> int:
    """Start the launcher in a session of its own, pass signals to its ranks, and give the job's exit code.

    ``forward``: signals by name and what the launcher gets for each, which passes them to ranks on other hosts; without it they
    go to the ranks of this host. ``directory``: where ranks write their codes, seen by all hosts. ``recorded`` is false where
    there is no such place: the launcher's own code is then the job's.
    """
    with ExitStack() as stack:
        # Ranks that are still dying may write into it.
        own = stack.enter_context(tempfile.TemporaryDirectory(prefix="horovod-jobs-", ignore_cleanup_errors=True))
        place = directory or Path(own)
        process = subprocess.Popen(
            planned.argv,
            env={
                **dict.fromkeys(_SESSION_VARIABLES, own),
                **planned.env,
                **({DIRECTORY_VARIABLE: str(place)} if recorded else {}),
            },
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        stopper = _Stopper(process, place, grace_s=grace_s, forward=forward)
        before = {number: signal.signal(number, stopper) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = stopper.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _kill_group(process)
        codes = {path.name.removeprefix("exit-"): int(path.read_text()) for path in sorted(place.glob("exit-*"))}
        begun = any(place.glob("pid-*"))
        lost = {path.name.removeprefix("lost-") for path in place.glob("lost-*")}
    failed = code_of_all(value for rank, value in codes.items() if rank not in lost)
    if lost and not failed and 0 in codes.values():
        return 0  # The others went on without those, and came to the end.
    if not failed and code not in (0, *_AGREED) and stopper.asked:
        print(f"error: {early.said(stopper.asked)}", file=sys.stderr)
        return 128 + stopper.asked  # Ended by force before a rank could tell its code.
    # mpirun gives 0 or 255 where a host is lost with its daemon: ranks that began and told nothing have not ended well.
    if recorded and not failed and (128 < code < 160 or (begun and (code > 0 or not codes))):
        if forward is not None:  # Where a host is cut off the launcher says nothing of its own.
            print(f"error: ranks were lost (exit code {code} of the launcher): one was killed, or a host was cut off; see that the "
                  "hosts are up; the same command goes on from the last checkpoint", file=sys.stderr)  # fmt: skip
        if stopper.gone:
            said = " and ".join(f"rank {rank} (process {pid})" for rank, pid in stopper.gone)
            print(
                f"error: {said} was ended from outside; the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
        return WorldError.exit_code  # A rank was ended from outside, by a signal or by MPI; the launcher has named it.
    return failed or (128 - code if code < 0 else code)


def _die_with_parent() -> None:
    # A killed parent must not leave ranks behind: the kernel then ends mpirun, and mpirun its ranks. Linux only.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


class _Stopper:
    """A signal handler that asks the ranks to stop, then insists."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        directory: Path,
        *,
        grace_s: float,
        forward: Mapping[str, str] | None = None,
    ) -> None:
        self._process, self._directory, self._grace_s = process, directory, grace_s
        self._forward = forward
        self._deadline: float | None = None
        self.asked = 0  # the first signal
        self.gone: list[
            tuple[str, int]
        ] = []  # ranks of this host, with their processes, that ended first and told no code

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first = self._deadline is None
        self.asked = self.asked or int(number)
        self._deadline = time.monotonic() + (self._grace_s if first else 0.0)
        if self._forward is not None:
            if first:
                if number == signal.SIGINT:
                    tell_stopping()
                self._process.send_signal(signal.Signals[self._forward[signal.Signals(number).name]])
            return  # The launcher passes it on; a second one ends the launcher.
        for path in self._directory.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.name.split("-")[1]), number)
        listening = any(self._directory.glob("pid-*"))
        if first and not listening:
            self._deadline = time.monotonic()  # No rank listens yet.
        elif first and number == signal.SIGINT:
            tell_stopping()

    def _note_gone(self) -> None:
        """Who has died by itself is gone before the launcher ends the others, which takes it a moment."""
        if self._forward is not None or self.gone:
            return  # Ranks may be on other hosts.
        processes = {int(path.name.split("-")[1]): path.read_text() for path in self._directory.glob("pid-*")}
        ended = {pid for pid in processes if _ended(pid)}
        if ended and len(ended) < len(processes):
            ranks = [(processes[pid], pid) for pid in sorted(ended) if processes[pid]]
            self.gone = [one for one in ranks if not (self._directory / f"exit-{int(one[0]):06d}").exists()]

    def _note_failed(self) -> None:
        """Where a rank has failed the job has: the others are given a moment to end."""
        if self._deadline is not None:
            return
        lost = {path.name.removeprefix("lost-") for path in self._directory.glob("lost-*")}
        for path in self._directory.glob("exit-*"):
            code = path.read_text()
            if code.isdigit() and int(code) not in (0, *_AGREED) and path.name.removeprefix("exit-") not in lost:
                self._deadline = time.monotonic() + _LEAVE_S
                return

    def wait(self) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=_LOOK_S)
            self._note_gone()
            self._note_failed()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=10)
                _kill_group(self._process)
                return self._process.wait()


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
