"""What a worker keeps beside its parameters: its flags on their way to all others, and a server in a thread (colocated)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from horovod_jobs.comm.channel import Wire, wait_until
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.server import Server


class Flags:
    """This worker's flags on their way to the first server, and its answer. ``check`` drives other messages on meanwhile."""

    def __init__(self, up: Wire, down: Wire, *, server: int, check: Callable[[], None]) -> None:
        self._told = torch.zeros(2 + protocol.FLAGS, dtype=torch.float64)
        self._answer = torch.zeros(protocol.FLAGS, dtype=torch.float64)
        self._sender = up.sender(self._told, to=server, tag=protocol.AGREE)
        self._receiver = down.receiver(self._answer, source=server, tag=protocol.AGREE)
        self._check = check
        self._own = torch.zeros(0)

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

        wait_until(done)
        wait_until(self._sender.Test)
        return torch.cat([self._answer, self._own[protocol.FLAGS :]])


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

    def stop(self) -> None:
        """End it, whatever it waits for."""
        self._server.stop()
        self._thread.join()

    def join(self, *, limit_s: float) -> None:
        """Wait for its stage to end, which takes every worker; not for ever, because a worker may have failed."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self.stop()
