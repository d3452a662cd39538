"""The last resort where MPI does not end a job whose rank has died: a thread that does, if nobody else has."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable

from horovod_jobs.errors import WorldError

_LOOK_S, _GRACE_S = 0.5, 20.0


class Watch:
    """Ends this process some time after a rank has died without which the others cannot go on.

    The loss is noticed where it matters: by who waits for that rank. This is for a rank that waits for somebody who waits in vain.

    Attributes: ``endures``: the others can do for now without a rank that is not in ``vital``.
    """

    def __init__(self, lost: Callable[[], Collection[int]], *, vital: Collection[int], hosts: Collection[str]) -> None:
        self._lost, self._vital, self._hosts = lost, frozenset(vital), tuple(hosts)
        self.endures = False
        self._tolerated: frozenset[int] = frozenset()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="rank-watch", daemon=True).start()

    def tolerate(self, ranks: Iterable[int]) -> None:
        """The others have gone on without these."""
        self._tolerated |= frozenset(ranks)

    def stop(self) -> None:
        """Whatever happens from here on is in order."""
        self._done.set()

    def _run(self) -> None:
        since: float | None = None
        while not self._done.wait(_LOOK_S):
            fatal = frozenset(self._lost()) - self._tolerated
            if self.endures:
                fatal &= self._vital
            if not fatal:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > _GRACE_S:
                rank = min(fatal)
                sys.stderr.write(
                    f"error: rank {rank} on {self._hosts[rank]} has ended; the same command goes on from the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(WorldError.exit_code)
