"""A server: it holds shards of one training stage after another, until it is sent home.

It runs as a rank of its own, or in a thread of every worker (colocated). One thread does everything in turns, so nothing is locked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from horovod_jobs.comm.channel import CONTROL, Backoff, Incoming, is_loss
from horovod_jobs.errors import JobError, WorldError
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.stage import Seat, Stage, receive_arrays

# Longest sleep between two looks, while workers train and when nothing has come for a while: an idle server must not burn a core.
_BUSY_S, _IDLE_S, _QUIET_AFTER_S = 0.0003, 0.02, 1.0
_YIELDS_BESIDE = 2
_LOOK_S = 0.05  # between two looks for ranks that have died
_log = logging.getLogger("horovod_jobs")


def _no() -> bool:
    return False


class Server:
    """Answers the workers. ``on_run`` hears of each run that the workers begin: its directory, and None when it is over."""

    def __init__(self, seat: Seat, *, on_run: Callable[[str | None], None] | None = None) -> None:
        self.seat, self._on_run = seat, on_run
        self._worker_of = {rank: index for index, rank in enumerate(self.seat.workers)}
        self.stage: Stage | None = None
        self._left = set(range(len(self.seat.workers)))  # workers that have left the last stage
        self._waiting: list[tuple[int, Any, Any]] = []  # a stage that begins before all have left the last one
        self._over = False
        # What else this thread drives on in its turns (whether anything moved), and whether a worker computes beside it.
        self.beside: Callable[[], bool] = _no
        self.spare: Callable[[], bool] = _no
        self._known: set[int] = set()  # ranks that have died
        self._looked = 0.0

    def serve(self, *, stages: int | None = None) -> None:
        """Until the first worker says that it is over, ``stop`` is called, or so many stages have ended.

        Raises:
            WorldError: a rank has died without which the others cannot go on.
        """
        backoff, ended, heard = Backoff(), 0, time.monotonic()
        while not self._over and (stages is None or ended < stages):
            had = self.stage
            if self.turn():
                backoff.reset()
                heard = time.monotonic()
            else:
                quiet = self.stage is None or time.monotonic() - heard > _QUIET_AFTER_S
                # A core that is yielded in turns with a layer is half lost to the layer, so it hardly yields beside one.
                backoff.rest(longest_s=_IDLE_S if quiet else _BUSY_S, yields=_YIELDS_BESIDE if self.spare() else None)
            ended += had is not None and self.stage is None

    def stop(self) -> None:
        """Make ``serve`` return, from another thread."""
        self._over = True

    def turn(self) -> bool:
        """Handle what has arrived. Whether anything had."""
        moved = False
        while not self._over and (message := self.seat.up.probe()) is not None:
            moved = True
            self._take(message)
        if self.stage is not None:
            moved |= self.stage.turn()
        moved |= self.beside()
        self._look()
        if self.stage is None and self._waiting and len(self._left) == len(self.seat.workers):
            self._begin(*self._waiting.pop(0))
        return moved

    def _look(self) -> None:
        """See whether ranks have died, and go on without them where that is possible."""
        if self._over or time.monotonic() < self._looked + _LOOK_S:
            return
        self._looked = time.monotonic()
        self._without(self.seat.up.lost())

    def _without(self, lost: Iterable[int]) -> None:
        for rank in sorted(set(lost) - self._known):
            self._known.add(rank)
            if rank in self.seat.servers or rank == self.seat.workers[0]:
                raise WorldError(f"{self.seat.obituary(rank)}; the same command goes on from the last checkpoint")
            if rank in self._worker_of:
                self._drop(rank)

    def _drop(self, rank: int) -> None:
        worker = self._worker_of[rank]
        if self.stage is None:
            return
        if not self.stage.drop(worker):
            raise WorldError(
                f"{self.seat.obituary(rank)}, and strategy.consistency=sync waits for all; the same command goes on from the last "
                "checkpoint"
            )
        _log.warning("%s; the others go on without it", self.seat.obituary(rank))
        self._leave(worker)

    def _take(self, message: Incoming) -> None:
        try:
            self._read(message)
        except Exception as error:
            if not is_loss(error):
                raise  # Else its sender has died in the middle of it.

    def _read(self, message: Incoming) -> None:
        if message.source in self._known:
            return
        if message.tag == CONTROL:
            self._control(message.source, message.json())
            return
        if self.stage is None:
            raise WorldError(f"a parameter server got a message ({message.tag}) of no stage; start the job again")
        if message.tag == protocol.NORM:
            self.stage.take_norm(message)
        else:
            self.stage.take(self._worker_of[message.source], message)

    def _control(self, source: int, order: dict[str, Any]) -> None:
        kind = order["op"]
        if kind == "shutdown":
            self._over = True
        elif kind == "run":
            if self._on_run is not None:
                self._on_run(order["directory"])
        elif kind == "bind":
            self._waiting.append((source, order, receive_arrays(self.seat.up, order, source=source)))
        elif kind == "unbind":
            self._leave(self._worker_of[source])
        elif self.stage is not None and kind == "fetch":
            # All who ask have met and know who has died; what such a worker sent must not change anything between their reads.
            self._without(set(self.seat.workers) - set(order["workers"]))
            self.stage.give_all(self._worker_of[source])
        elif self.stage is not None and kind == "order":
            self.stage.prefer(self._worker_of[source], order["chunks"])
        elif self.stage is not None and kind == "state":
            self.stage.give_state(source)
        elif self.stage is not None and kind == "report":
            self.seat.down.send_json(self.stage.report(), to=source)

    def _leave(self, worker: int) -> None:
        self._left.add(worker)
        if len(self._left) == len(self.seat.workers):
            if self.stage is not None:
                self.stage.end()
            self.stage = None

    def _begin(self, source: int, order: dict[str, Any], tensors: dict[int, dict[str, Tensor]]) -> None:
        self.seat = replace(self.seat, workers=tuple(order["workers"]))  # Some may have died since the stage before.
        self._worker_of = {rank: index for index, rank in enumerate(self.seat.workers)}
        try:
            self.stage = Stage(self.seat, order, tensors)
        except JobError as error:
            self.seat.down.send_json({"error": str(error)}, to=source)
            return
        self._left.clear()
        self.seat.down.send_json({"error": None}, to=source)
        for rank in self._known & self._worker_of.keys():
            self._drop(rank)
