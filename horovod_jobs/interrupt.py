"""Stop on request: a signal is noted, ranks agree on it, a checkpoint is written, and the exit code says "try again"."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from horovod_jobs.comm.world import World
from horovod_jobs.errors import Interrupted, InterruptedByUser


def tell_stopping() -> None:
    """Answer Ctrl-C. Not through sys.stderr: the signal may have come in the middle of a write to it, which allows no second one."""
    with contextlib.suppress(OSError):
        os.write(2, b"\nStopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.\n")


class StopRequest:
    """Whether somebody asked this rank to stop. ``code`` is 0, 1 (SIGTERM, SIGUSR1) or 2 (Ctrl-C).

    A launcher over hosts sends SIGUSR2 for Ctrl-C, because mpirun passes that one on to ranks everywhere. ``told``: the launcher
    answers the person who pressed it.
    """

    def __init__(self, *, told: bool = False) -> None:
        self.code = 0
        self._told = told

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.code == 2:
                raise KeyboardInterrupt
            self.code = 2
            if not self._told:
                # By every rank, for one that waits in a collective does not come to this.
                tell_stopping()
        elif number == signal.SIGUSR2:
            self.code = 2
        elif self.code == 0:
            self.code = 1

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Take SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 for the time of the body."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_agreed(self, world: World, *, where: str) -> None:
        """Collective. Stop every rank if any was asked to.

        Raises:
            Interrupted: somebody was.
        """
        code = max(world.gather_json(self.code, name=f"stop.{where}"))
        if code:
            raise stopped(code, where=where)


def stopped(code: int, *, where: str) -> Interrupted:
    """The error for an agreed stop."""
    if code == 2:
        return InterruptedByUser(f"stopped by Ctrl-C {where}; the same command goes on from here")
    return Interrupted(f"stopped by a signal {where}; the same command goes on from here")
