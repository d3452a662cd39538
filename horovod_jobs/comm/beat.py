"""How ranks that are busy with different stages hear of each other: a small exchange of the whole world, a few times a second.

It runs in a thread of every rank beside the stage, so that a stage knows nothing of it; only the ranks that are asked to stop look
at a flag, as they do for signals.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from horovod_jobs.comm.world import World

WORKING, DONE, FAILED = 0, 1, 2


class Beat:
    """Carries news from rank to rank until all ranks have finished. Every rank makes one, starts it and finishes.

    Args:
        world: the whole world; nothing else may use it collectively until ``over``.
        stopped: this rank's own stop request, as a code (0: none).
        ask: called with a code where the others want this rank's stage to stop.
        deliver: on rank 0, called with every message of the other ranks, in the order of each rank.
        interval_s: time between two exchanges.
    """

    def __init__(
        self,
        world: World,
        *,
        stopped: Callable[[], int],
        ask: Callable[[int], None],
        deliver: Callable[[list[Any]], None],
        interval_s: float = 0.25,
    ) -> None:
        self._world, self._stopped, self._ask, self._deliver = world, stopped, ask, deliver
        self._interval_s = interval_s
        self._state = WORKING
        self._states = [WORKING] * world.size
        self._messages: deque[list[Any]] = deque()
        self._wake = threading.Event()
        self.over = threading.Event()  # all ranks have finished, or the world is lost
        self.lost: BaseException | None = None
        self.undelivered: Exception | None = None  # what stopped rank 0 from keeping a message
        self.signal = 0  # the strongest request to stop that any rank got from outside

    def start(self) -> None:
        """Begin. Collective, and does not wait."""
        threading.Thread(target=self._run, name="beat", daemon=True).start()

    def post(self, message: list[Any]) -> None:
        """Send a JSON value to rank 0."""
        self._messages.append(message)

    def finish(self, *, failed: bool) -> None:
        """This rank's stage has ended; where it failed, the others are asked to stop."""
        self._state = FAILED if failed else DONE
        self._wake.set()

    def ended(self, ranks: Iterable[int]) -> bool:
        """Whether all of these ranks have finished, as far as this one knows."""
        return all(self._states[rank] != WORKING for rank in ranks)

    def _run(self) -> None:
        try:
            while not self._exchange():
                self._wake.wait(self._interval_s)
                self._wake.clear()
        except BaseException as error:
            self.lost = error
            self._ask(1)  # A stage on one rank has no collective that would tell it.
        finally:
            self.over.set()

    def _exchange(self) -> bool:
        state = FAILED if self.undelivered is not None else self._state
        # After the state: what was posted before the end goes with it.
        messages = [self._messages.popleft() for _ in range(len(self._messages))]
        told = self._world.gather_json([state, self._stopped(), messages], name="beat")
        self.signal = max(self.signal, *(code for _, code, _ in told))
        self._states = [entry[0] for entry in told]
        asked = max(self.signal, int(FAILED in self._states))
        if asked:
            self._ask(asked)
        if self._world.is_main:
            for _, _, news in told:
                self._keep(news)
        return WORKING not in self._states

    def _keep(self, messages: list[list[Any]]) -> None:
        for message in messages:
            try:
                self._deliver(message)
            except Exception as error:
                self.undelivered = self.undelivered or error
