"""Typed messages from one rank to another over MPI: the bytes of tensors, numbers and JSON, never a pickle.

A parameter server's messages go up (to a server) and down (to a worker) on a communicator each, so that a process that is both
tells them apart.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

CONTROL = 0  # the tag of JSON
_WITH_ULFM = "OMPI_MCA_mpi_ft_enable"  # set by mpirun --with-ft ulfm
_ERRORS_OF_LOSS = tuple(
    getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)
)
_YIELDS = 50


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as MPI takes it: an array of bytes that shares it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


@cache
def outlives_ranks() -> bool:
    """Whether this MPI goes on without a rank that dies (ULFM; ``mpirun --with-ft ulfm``) and does not end all the others."""
    return os.environ.get(_WITH_ULFM, "").lower() in ("1", "true") and hasattr(MPI.Comm, "Get_failed")


def is_loss(error: BaseException) -> bool:
    """Whether MPI says by this error that a rank which takes part has died."""
    return isinstance(error, MPI.Exception) and error.Get_error_class() in _ERRORS_OF_LOSS


def failed_in(comm: Any) -> frozenset[int]:
    """Ranks of a communicator that have died, as far as MPI has heard; none where MPI ends the job with them."""
    if not outlives_ranks():
        return frozenset()
    group = comm.Get_failed()
    try:
        return frozenset(group.Translate_ranks(None, comm.group)) if group.Get_size() else frozenset()
    finally:
        group.Free()


class Backoff:
    """Waits politely: yields the core a few times, then sleeps longer and longer, up to ``longest_s``."""

    def __init__(self, *, longest_s: float = 0.0003, yields: int = _YIELDS) -> None:
        self._longest_s, self._yields = longest_s, yields
        self._count = 0

    def reset(self) -> None:
        """Something happened."""
        self._count = 0

    def rest(self, *, longest_s: float | None = None, yields: int | None = None) -> None:
        """Nothing happened."""
        self._count += 1
        over = self._count - (self._yields if yields is None else yields)
        if over <= 0:
            os.sched_yield()
        else:
            time.sleep(min(0.00002 * 1.3 ** min(40, over), longest_s or self._longest_s))


def wait_until(done: Callable[[], bool], *, name: str = "message", limit_s: float | None = None) -> bool:
    """Whether ``done`` came true within ``limit_s``. Asking it must drive the messages on.

    The watchdog finds ``name`` here and in ``sleep_until``: whoever is in one of them waits, whatever ``done`` does (see ``pulse``).
    """
    backoff, deadline = Backoff(), None if limit_s is None else time.monotonic() + limit_s
    while not done():
        if deadline is not None and time.monotonic() > deadline:
            return False
        backoff.rest()
    return True


def sleep_until(
    done: Callable[[], bool], condition: threading.Condition, *, name: str, look_s: float, limit_s: float | None = None
) -> bool:
    """The same while another thread drives the messages on and notifies ``condition``, which is held."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while not done():
        if deadline is not None and time.monotonic() > deadline:
            return False
        condition.wait(look_s)
    return True


@dataclass(frozen=True)
class Incoming:
    """A message that has arrived and is not yet read."""

    source: int
    tag: int
    nbytes: int
    message: Any

    def read(self, tensor: Tensor) -> None:
        """Read a small message, which has arrived whole, into ``tensor``."""
        self.message.Recv([as_bytes(tensor), MPI.BYTE])

    def start(self, tensor: Tensor) -> Any:
        """Start reading into ``tensor``; gives a request."""
        return self.message.Irecv([as_bytes(tensor), MPI.BYTE])

    def json(self) -> Any:
        """The value of a control message."""
        buffer = bytearray(self.nbytes)
        self.message.Recv([buffer, MPI.BYTE])
        return json.loads(buffer.decode())


class Wire:
    """One direction. A request that it gives has ``Test()`` and ``Wait()``, a persistent one also ``Start()``."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._status = MPI.Status()

    def lost(self) -> frozenset[int]:
        """Ranks that have died, as far as MPI has heard; see ``failed_in``."""
        return failed_in(self._comm)

    def probe(self) -> Incoming | None:
        """The next message to this rank, if there is one. Messages of one sender come in the order it sent them."""
        try:
            message = self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
        except MPI.Exception as error:
            if not is_loss(error):
                raise
            self._comm.Ack_failed()  # From anybody means from anybody who is left: MPI wants to be told that this is meant.
            return None
        if message is None:
            return None
        status = self._status
        return Incoming(status.Get_source(), status.Get_tag(), status.Get_count(MPI.BYTE), message)

    def probe_from(self, source: int, tag: int) -> Incoming | None:
        """The next message of this sender and tag, if there is one."""
        message = self._comm.Improbe(source, tag, self._status)
        if message is None:
            return None
        return Incoming(source, tag, self._status.Get_count(MPI.BYTE), message)

    def next_from(self, source: int, tag: int, *, poke: Callable[[], None] | None = None) -> Incoming:
        """Wait for a message of this sender and tag."""
        found: list[Incoming] = []

        def arrived() -> bool:
            if poke is not None:
                poke()
            message = self.probe_from(source, tag)
            found.extend([message] if message is not None else [])
            return bool(found)

        wait_until(arrived)
        return found[0]

    def send(self, tensor: Tensor, *, to: int, tag: int) -> Any:
        """Start sending; the tensor must stay as it is until the request is done."""
        return self._comm.Isend([as_bytes(tensor), MPI.BYTE], to, tag)

    def receive(self, tensor: Tensor, *, source: int, tag: int) -> None:
        """Wait for a message and read it into ``tensor``."""
        request = self._comm.Irecv([as_bytes(tensor), MPI.BYTE], source, tag)
        wait_until(request.Test)

    def send_json(self, value: Any, *, to: int) -> None:
        """Send a control message, and wait until it is on its way."""
        request = self._comm.Isend([json.dumps(value).encode(), MPI.BYTE], to, CONTROL)
        wait_until(request.Test)

    def sender(self, tensor: Tensor, *, to: int, tag: int) -> Any:
        """A persistent request that sends ``tensor`` every time it is started."""
        return self._comm.Send_init([as_bytes(tensor), MPI.BYTE], to, tag)

    def receiver(self, tensor: Tensor, *, source: int, tag: int) -> Any:
        """A persistent request that receives into ``tensor`` every time it is started."""
        return self._comm.Recv_init([as_bytes(tensor), MPI.BYTE], source, tag)


def some(requests: list[Any]) -> list[int]:
    """Positions of the requests that are done, in one look at all of them."""
    return MPI.Request.Testsome(requests) or []


def finished(requests: list[Any]) -> list[int]:
    """Positions of the requests that are done, in one look at all of them. One to or from a rank that has died is done as well."""
    if not requests:
        return []
    try:
        return MPI.Request.Testsome(requests) or []
    except MPI.Exception:
        # It does not say which; those that it has ended are null now, and a null request is done.
        return [position for position, request in enumerate(requests) if done(request)]


def done(request: Any) -> bool:
    """Whether a request has ended; one to or from a rank that has died has."""
    try:
        return bool(request.Test())
    except MPI.Exception as error:
        if not is_loss(error):
            raise
        return True
