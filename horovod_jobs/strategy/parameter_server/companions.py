"""What a worker keeps beside its parameters: its flags on their way to all others, its look at who has died, and a server in a thread
(colocated)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import Wire, wait_until
from horovod_jobs.errors import WorldError
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.courier import Courier
from horovod_jobs.strategy.parameter_server.server import Server
from horovod_jobs.strategy.parameter_server.stage import Seat

_LOOK_S = 0.1  # between two looks for ranks that have died
_log = logging.getLogger("horovod_jobs")


class Flags:
    """This worker's flags on their way to the first server, and its answer. ``check`` raises where waiting is in vain."""

    def __init__(self, up: Wire, down: Wire, *, server: int, workers: int, check: Callable[[], None]) -> None:
        self._told = torch.zeros(2 + protocol.FLAGS, dtype=torch.float64)
        self._answer = torch.zeros(protocol.FLAGS + workers, dtype=torch.float64)
        self._sender = up.sender(self._told, to=server, tag=protocol.AGREE)
        self._receiver = down.receiver(self._answer, source=server, tag=protocol.AGREE)
        self._check = check
        self._own = torch.zeros(0)
        self.gone_from = [0] * workers  # step from which on each worker is gone; 0: it is there

    def tell(self, values: Tensor, *, step: int, hold: bool) -> Flags:
        """Send the first values; ``wait`` gives them as all agreed, and the rest as it is."""
        self._told[0], self._told[1] = step, float(hold)
        self._told[2:] = values[: protocol.FLAGS]
        self._own = values
        self._receiver.Start()
        self._sender.Start()
        return self

    def wait(self) -> Tensor:
        def done() -> bool:
            self._check()
            return bool(self._receiver.Test())

        wait_until(done, name="flags")
        wait_until(self._sender.Test, name="flags")
        self.gone_from = [int(step) for step in self._answer[protocol.FLAGS :].tolist()]
        return torch.cat([self._answer[: protocol.FLAGS], self._own[protocol.FLAGS :]])


class Losses:
    """The ranks that have died, as MPI tells it while this worker waits for others.

    endures: whether the workers can go on without one of them. tells: whether this rank says so on the console.
    """

    def __init__(self, seat: Seat, *, endures: bool, tells: bool) -> None:
        self._seat, self._endures, self._tells = seat, endures, tells
        self._looked = 0.0
        self.found: list[dict[str, Any]] = []  # rank and host of workers without which the others go on

    def look(self, *, now: bool = False) -> None:
        """Look again, if that is due.

        Raises:
            WorldError: a rank has died without which this worker cannot go on.
        """
        if not now and time.monotonic() < self._looked + _LOOK_S:
            return
        self._looked = time.monotonic()
        seat = self._seat
        for rank in sorted(seat.up.lost()):
            if rank in seat.servers or rank == seat.workers[0] or not self._endures:
                raise WorldError(f"{seat.obituary(rank)}; the same command goes on from the last checkpoint")
            if rank in seat.workers and all(rank != one["rank"] for one in self.found):
                self.found.append({"rank": rank, "host": seat.hosts[rank]})
                if self._tells:
                    _log.warning("%s; the others go on without it and take its samples over", seat.obituary(rank))


class Host:
    """A server in a thread of this process, for one stage."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="parameter-server", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.serve(stages=1)
        except BaseException as error:
            self.error = error

    def drive(self, courier: Courier) -> None:
        """Also drive this on, in turns: two threads that look for messages would take each other's time."""
        self._server.beside, self._server.spare = courier.poke, lambda: not courier.awaited

    def stop(self) -> None:
        """End it, whatever it waits for."""
        self._server.stop()
        self._thread.join()

    def join(self, *, limit_s: float) -> None:
        """Wait for its stage to end, which takes every worker; not for ever, because a worker may have failed."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self.stop()
