"""A worker's side of the exchange: flat buffers out and back, the most urgent chunk first, a few in flight at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import Backoff, Wire, sleep_until, some
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.lanes import Lanes
from horovod_jobs.strategy.parameter_server.sharding import Layout

_LOOK_S = 0.05  # between two checks while waiting
# Longest sleep of the driver between two looks: while messages move, and when none has for a while, because a server waits for others.
_BUSY_S, _QUIET_S, _QUIET_AFTER_S, _YIELDS_BESIDE = 0.0003, 0.002, 0.1, 2
_NAMED_WITHIN_S = 1.0  # MPI tells which rank has died a little after its messages fail


class Courier:
    """Sends chunks as their tensors become ready, and receives them updated.

    Another thread (``Driver``, or the server's where it is colocated) drives the messages on by ``poke``, so that they travel while
    layers compute; the thread that trains only stages and waits. One lock guards what both touch. A buffer belongs to the training
    thread while its chunk is here, and to MPI while it is away. Buffers and requests are made once.

    Args:
        servers: rank of each server on the wires.
        first: the server that is sent to first, another one for each worker.
        check: called while waiting; raises where waiting is in vain.
    """

    def __init__(
        self, up: Wire, down: Wire, layout: Layout, parameters: Sequence[Tensor], *, servers: Sequence[int], window_bytes: int,
        first: int, check: Callable[[], None],
    ) -> None:  # fmt: skip
        self._layout, self._parameters, self._check = layout, list(parameters), check
        pin = any(parameter.is_cuda for parameter in parameters)
        self._out = [torch.zeros(numel, dtype=dtype, pin_memory=pin) for _, dtype, numel in layout.buffers]
        self._back = [torch.zeros(numel, dtype=dtype, pin_memory=pin) for _, dtype, numel in layout.buffers]
        self._senders, self._receivers = [], []
        for chunk in layout.chunks:
            part, tag, rank = slice(chunk.start, chunk.stop), protocol.tag(chunk.index), servers[chunk.server]
            self._senders.append(up.sender(self._out[chunk.buffer][part], to=rank, tag=tag))
            self._receivers.append(down.receiver(self._back[chunk.buffer][part], source=rank, tag=tag))
        self._bytes = [layout.nbytes(chunk) for chunk in layout.chunks]
        self._chunks_of = [layout.chunks_of(index) for index in range(len(parameters))]
        self._views_out = [self._view(self._out, index) for index in range(len(parameters))]
        self._views_back = [self._view(self._back, index) for index in range(len(parameters))]
        self._inside = [layout.parameters_of(index) for index in range(len(layout.chunks))]
        self._missing = [len(inside) for inside in self._inside]  # parameters of a chunk that are not yet staged
        self._urgency = list(range(len(layout.chunks)))
        # Below is what both threads touch, under the lock.
        self._lock = threading.Condition()
        self._lanes: Lanes[int] = Lanes(
            len(servers), window_bytes=window_bytes, largest_bytes=max(self._bytes, default=0), first=first
        )
        self._sending: dict[int, Any] = {}  # chunk -> request
        self._coming: dict[int, Any] = {}
        self._away = [False] * len(layout.chunks)  # staged or asked for, and not yet back
        self._fresh: list[set[int]] = [set() for _ in parameters]  # chunks that are back, and not yet in the parameter
        self._error: BaseException | None = None
        self.awaited = False  # the training thread waits, so its core is free
        self.bytes_out = self.bytes_in = 0

    def _view(self, buffers: list[Tensor], index: int) -> Tensor:
        place = self._layout.places[index]
        return buffers[place.buffer][place.start : place.stop].view(self._parameters[index].shape)

    def prefer(self, order: Sequence[int]) -> list[int]:
        """From now on chunks go in the order in which these parameters are needed. Gives the numbers of the chunks in that order."""
        rank = {index: number for number, index in enumerate(order)}
        needed = [min(rank.get(index, len(rank)) for index in inside) for inside in self._inside]
        chunks = sorted(range(len(needed)), key=lambda chunk: (needed[chunk], chunk))
        for number, chunk in enumerate(chunks):
            self._urgency[chunk] = number
        return chunks

    # --- out --------------------------------------------------------------------------------------------------------
    def stage(self, index: int, value: Tensor | None, *, otherwise: Tensor | None = None, guard: bool = False) -> bool:
        """Push a parameter's gradient or weights, once a step; None: zeros.

        ``guard``: what is not finite never travels, ``otherwise`` (or zeros) goes in its place. Whether ``value`` went.
        """
        chunks = self._chunks_of[index]
        self._until(lambda: not any(self._away[chunk] or chunk in self._sending for chunk in chunks))
        view, sound = self._views_out[index], True
        if value is not None and value.is_contiguous() and not guard:
            flat, given = view.view(-1), value.view(-1)
            for chunk in chunks:  # The first piece of a large tensor leaves while the next is being copied.
                part = self._part(index, chunk)
                flat[part].copy_(given[part])
                self._staged(chunk)
            return True
        if value is None:
            view.zero_()
        else:
            view.copy_(value)
            if guard and not bool(torch.isfinite(view.sum())):
                sound = False
                view.zero_() if otherwise is None else view.copy_(otherwise)
        for chunk in chunks:
            self._staged(chunk)
        return sound

    def _part(self, index: int, chunk: int) -> slice:
        """The elements of a parameter that a chunk has."""
        place, lies = self._layout.places[index], self._layout.chunks[chunk]
        return slice(max(place.start, lies.start) - place.start, min(place.stop, lies.stop) - place.start)

    def _staged(self, chunk: int) -> None:
        """One parameter more of a chunk is in the buffer; with the last it can go."""
        self._missing[chunk] -= 1
        if self._missing[chunk]:
            return
        self._missing[chunk] = len(self._inside[chunk])
        with self._lock:
            self._away[chunk] = True
            lane = self._layout.chunks[chunk].server
            self._lanes.put(lane, chunk, nbytes=self._bytes[chunk], urgency=self._urgency[chunk])
            self._start()
            self._lock.notify_all()

    def last(self, index: int) -> Tensor:
        """A parameter as it came back last."""
        return self._views_back[index]

    # --- under way, by any thread -------------------------------------------------------------------------------------
    def poke(self) -> bool:
        """Drive the messages on: note what has left and what has come back, start what is next. Whether anything moved."""
        with self._lock:
            if not self._sending and not self._coming:
                return False
            out, back = list(self._sending), list(self._coming)
            moved = some([*self._sending.values(), *self._coming.values()])
            for position in moved:
                if position < len(out):
                    self._sent(out[position])
                else:
                    self._arrived(back[position - len(out)])
            if moved:
                self._start()
                self._lock.notify_all()
        return bool(moved)

    def _start(self) -> None:
        while (chunk := self._lanes.take()) is not None:
            self._expect(chunk)
            self._senders[chunk].Start()
            self._sending[chunk] = self._senders[chunk]
            self.bytes_out += self._bytes[chunk]

    def _expect(self, chunk: int) -> None:
        self._receivers[chunk].Start()
        self._coming[chunk] = self._receivers[chunk]

    def _sent(self, chunk: int) -> None:
        del self._sending[chunk]
        self._lanes.landed(self._layout.chunks[chunk].server, nbytes=self._bytes[chunk])

    def _arrived(self, chunk: int) -> None:
        del self._coming[chunk]
        self.bytes_in += self._bytes[chunk]
        for index in self._inside[chunk]:
            self._fresh[index].add(chunk)
        self._away[chunk] = False  # Last: ``fetch`` reads both without the lock.

    def sleep(self, stopped: Callable[[], bool]) -> None:
        """Until there is something to drive on, or ``wake`` was called and it is to stop."""
        with self._lock:
            self._lock.wait_for(lambda: bool(self._sending or self._coming) or stopped())

    def wake(self, error: BaseException | None = None) -> None:
        """Whoever sleeps or waits looks again; with an error that the driving thread has met, they raise it."""
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    # --- back -------------------------------------------------------------------------------------------------------
    def expect_all(self) -> None:
        """Be ready to receive every chunk, which the servers are asked for."""
        with self._lock:
            for chunk in range(len(self._away)):
                self._expect(chunk)
                self._away[chunk] = True
            self._lock.notify_all()

    @torch.no_grad()
    def fetch(self, indices: Sequence[int]) -> None:
        """Wait until these parameters are back, and update them piece by piece as they come."""
        left = [(index, chunk) for index in indices for chunk in self._chunks_of[index]]
        while left:
            self._until(lambda: any(not self._away[chunk] for _, chunk in left))  # noqa: B023  Called at once.
            for index, chunk in left:
                if chunk in self._fresh[index] and not self._away[chunk]:
                    self._unpack(index, chunk)
            left = [(index, chunk) for index, chunk in left if self._away[chunk] or chunk in self._fresh[index]]

    def _unpack(self, index: int, chunk: int) -> None:
        parameter = self._parameters[index]
        self._fresh[index].discard(chunk)
        if parameter.is_contiguous():
            part = self._part(index, chunk)
            parameter.view(-1)[part].copy_(self._views_back[index].view(-1)[part])
        elif not self._fresh[index]:  # Its elements lie in another order (channels last): all at once.
            parameter.copy_(self._views_back[index])

    def _until(self, done: Callable[[], bool], *, limit_s: float | None = None) -> bool:
        """Whether ``done`` came true within the time. Another thread drives the messages on meanwhile."""

        def checked() -> bool:
            if done():
                return True
            if self._error is not None:
                self._give_up(self._error)
            self._check()
            self.awaited = True
            return False

        with self._lock:
            try:
                return sleep_until(checked, self._lock, name="parameters", look_s=_LOOK_S, limit_s=limit_s)
            finally:
                self.awaited = False

    def _give_up(self, error: BaseException) -> None:
        until = time.monotonic() + _NAMED_WITHIN_S
        while time.monotonic() < until:
            self._check()
            time.sleep(_LOOK_S)
        raise error

    def close(self, *, limit_s: float) -> bool:
        """Let everything come home. Whether it did within the time."""
        home = self._until(lambda: not (self._sending or any(self._away)), limit_s=limit_s)
        if home:
            with self._lock:
                for request in (*self._senders, *self._receivers):
                    request.Free()
        return home


class Driver:
    """A thread that drives a courier's messages on while layers compute. It sleeps while there are none."""

    def __init__(self, courier: Courier) -> None:
        self._courier, self._over = courier, False
        self._thread = threading.Thread(target=self._run, name="parameter-server-courier", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        backoff, moved = Backoff(), time.monotonic()
        try:
            while not self._over:
                self._courier.sleep(lambda: self._over)
                if self._courier.poke():
                    backoff.reset()
                    moved = time.monotonic()
                    continue
                # A core that is yielded in turns with a layer is half lost to the layer, so it hardly yields beside one.
                backoff.rest(
                    longest_s=_BUSY_S if time.monotonic() - moved < _QUIET_AFTER_S else _QUIET_S,
                    yields=None if self._courier.awaited else _YIELDS_BESIDE,
                )
        except BaseException as error:
            self._courier.wake(error)

    def stop(self) -> None:
        """End it."""
        self._over = True
        self._courier.wake()
        self._thread.join()
