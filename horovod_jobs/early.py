"""A signal while the program loads or looks around: one line and the code a shell knows, where Python would show a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}
# What the person typed, for the ranks that a launcher of this package starts: that one speaks for them.
COMMAND_VARIABLE = "HOROVOD_JOBS_COMMAND"
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_RANKS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")


def said(number: int) -> str:
    """What to say of a job that a signal has ended at once."""
    name = NAMES[signal.Signals(number)]
    return f"stopped at once by {name}; the same command starts again, from the last checkpoint where there is one"


def rank_hint(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank as the launcher's variables tell it, before any world is joined; 0 where there is none."""
    return next((int(environ[name]) for name in _RANKS if environ.get(name, "").isdigit()), 0)


def arm() -> None:
    """Take SIGINT and SIGTERM until something that can do better does. A signal that is ignored (``nohup``) stays so."""
    if COMMAND_VARIABLE in os.environ:
        return
    for number in _NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def disarm(*, outlived: bool) -> None:
    """For a launcher, which cleans up on Ctrl-C. ``outlived``: its job runs elsewhere and goes on, so SIGTERM has nothing to tell."""
    if signal.getsignal(signal.SIGINT) == _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if outlived:
        over()


def over() -> None:
    """How the job ended has been told: mpirun, which sends SIGTERM to the ranks that leave last, must not be told of as well."""
    if signal.getsignal(signal.SIGTERM) == _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    # By no exception: one that is raised in the middle of an import may be swallowed there, or be told of by whoever is importing.
    if rank_hint() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"error: {said(number)}\n".encode())
    os._exit(128 + number)
