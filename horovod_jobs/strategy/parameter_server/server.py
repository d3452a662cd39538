"""A server: it holds shards of one training stage after another, until it is sent home.

It runs as a rank of its own, or in a thread of every worker (colocated). One thread does everything in turns, so nothing is locked.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from horovod_jobs.comm.channel import CONTROL, Backoff, Incoming
from horovod_jobs.errors import JobError, WorldError
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.stage import Seat, Stage, receive_arrays

# Longest sleep between two looks, while workers train and when nothing has come for a while: an idle server must not burn a core.
_BUSY_S, _IDLE_S, _QUIET_AFTER_S = 0.0003, 0.02, 1.0


class Server:
    """Answers the workers."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self._worker_of = {rank: index for index, rank in enumerate(self.seat.workers)}
        self.stage: Stage | None = None
        self._left = set(range(len(self.seat.workers)))  # workers that have left the last stage
        self._waiting: list[tuple[int, Any, Any]] = []  # a stage that begins before all have left the last one
        self._over = False

    def serve(self, *, stages: int | None = None) -> None:
        """Until the first worker says that it is over, ``stop`` is called, or so many stages have ended."""
        backoff, ended, heard = Backoff(), 0, time.monotonic()
        while not self._over and (stages is None or ended < stages):
            had = self.stage
            if self.turn():
                backoff.reset()
                heard = time.monotonic()
            else:
                quiet = self.stage is None or time.monotonic() - heard > _QUIET_AFTER_S
                backoff.rest(longest_s=_IDLE_S if quiet else _BUSY_S)
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
        if self.stage is None and self._waiting and len(self._left) == len(self.seat.workers):
            self._begin(*self._waiting.pop(0))
        return moved

    def _take(self, message: Incoming) -> None:
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
        elif kind == "bind":
            self._waiting.append((source, order, receive_arrays(self.seat.up, order, source=source)))
        elif kind == "unbind":
            self._left.add(self._worker_of[source])
            if len(self._left) == len(self.seat.workers):
                if self.stage is not None:
                    self.stage.end()
                self.stage = None
        elif self.stage is not None and kind == "fetch":
            self.stage.give_all(self._worker_of[source])
        elif self.stage is not None and kind == "state":
            self.stage.give_state(source)
        elif self.stage is not None and kind == "report":
            self.seat.down.send_json(self.stage.report(), to=source)

    def _begin(self, source: int, order: dict[str, Any], tensors: dict[int, dict[str, Tensor]]) -> None:
        try:
            self.stage = Stage(self.seat, order, tensors)
        except JobError as error:
            self.seat.down.send_json({"error": str(error)}, to=source)
            return
        self._left.clear()
        self.seat.down.send_json({"error": None}, to=source)
