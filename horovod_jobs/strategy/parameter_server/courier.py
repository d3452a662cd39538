"""A worker's side of the exchange: flat buffers out and back, the most urgent chunk first, a few in flight at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import Wire, finished, wait_until
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.sharding import Layout


class Courier:
    """Sends chunks as their tensors become ready, and receives them updated.

    Chunks of the front layers overtake others that wait, because the next forward pass needs them first, and only ``window_bytes``
    are on their way at a time, so that there is something to overtake (Peng et al. 2019, doi:10.1145/3341301.3359642).
    Buffers and requests are made once.

    Args:
        servers: rank of each server on the wires.
        check: called while waiting; raises where waiting is in vain.
    """

    def __init__(
        self, up: Wire, down: Wire, layout: Layout, parameters: Sequence[Tensor], *, servers: Sequence[int], window_bytes: int,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self._layout, self._parameters, self._window_bytes, self._check = layout, list(parameters), window_bytes, check
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
        self._holds = [len(inside) for inside in self._inside]
        self._missing = list(self._holds)  # of these, how many are not yet staged
        self._queue: list[int] = []
        self._sending: list[int] = []
        self._owed = [False] * len(layout.chunks)  # pushed or asked for, and not yet back
        self._fresh = [False] * len(parameters)  # back, and not yet in the parameter
        self.bytes_out = self.bytes_in = 0

    def _view(self, buffers: list[Tensor], index: int) -> Tensor:
        place = self._layout.places[index]
        return buffers[place.buffer][place.start : place.stop].view(self._parameters[index].shape)

    # --- out --------------------------------------------------------------------------------------------------------
    def stage(self, index: int, value: Tensor | None, *, otherwise: Tensor | None = None, guard: bool = False) -> bool:
        """Push a parameter's gradient or weights, once a step; None: zeros.

        ``guard``: what is not finite never travels, ``otherwise`` (or zeros) goes in its place. Whether ``value`` went.
        """
        for chunk in self._chunks_of[index]:
            self._free(chunk)
        view, sound = self._views_out[index], True
        if value is None:
            view.zero_()
        else:
            view.copy_(value)
            if guard and not bool(torch.isfinite(view.sum())):
                sound = False
                view.zero_() if otherwise is None else view.copy_(otherwise)
        for chunk in self._chunks_of[index]:
            self._missing[chunk] -= 1
            if self._missing[chunk] == 0:
                self._missing[chunk] = self._holds[chunk]
                heapq.heappush(self._queue, chunk)
        self.poke()
        return sound

    def last(self, index: int) -> Tensor:
        """A parameter as it came back last."""
        return self._views_back[index]

    def _free(self, chunk: int) -> None:
        """Wait until the last push of a chunk has left its buffer and come back."""
        if self._owed[chunk]:
            self._wait(chunk)
        if chunk in self._sending:
            self._until(lambda: chunk not in self._sending)

    def poke(self) -> None:
        """Drive the messages on: note what has been sent, and start what is next."""
        self._check()
        if self._sending:
            done = set(finished([self._senders[chunk] for chunk in self._sending]))
            if done:
                self._sending = [chunk for position, chunk in enumerate(self._sending) if position not in done]
        flying = sum(self._bytes[chunk] for chunk in self._sending)
        while self._queue and (not self._sending or flying + self._bytes[self._queue[0]] <= self._window_bytes):
            chunk = heapq.heappop(self._queue)
            self._expect(chunk)
            self._senders[chunk].Start()
            self._sending.append(chunk)
            flying += self._bytes[chunk]
            self.bytes_out += self._bytes[chunk]

    def flush(self) -> None:
        """Until everything staged is on its way."""
        self._until(lambda: not self._queue)

    # --- back -------------------------------------------------------------------------------------------------------
    def _expect(self, chunk: int) -> None:
        self._receivers[chunk].Start()
        self._owed[chunk] = True

    def expect_all(self) -> None:
        """Be ready to receive every chunk, which the servers are asked for."""
        for chunk in range(len(self._owed)):
            self._expect(chunk)

    def _wait(self, chunk: int) -> None:
        self._until(self._receivers[chunk].Test)
        self._owed[chunk] = False
        self.bytes_in += self._bytes[chunk]
        for index in self._inside[chunk]:
            self._fresh[index] = True

    @torch.no_grad()
    def fetch(self, indices: Sequence[int]) -> None:
        """Wait until these parameters are back, and update them."""
        for index in indices:
            for chunk in self._chunks_of[index]:
                if self._owed[chunk]:
                    self._wait(chunk)
            if self._fresh[index]:
                self._parameters[index].copy_(self._views_back[index])
                self._fresh[index] = False

    def _until(self, done: Callable[[], bool]) -> None:
        def ask() -> bool:
            self.poke()
            return bool(done())

        wait_until(ask)

    def close(self, *, limit_s: float) -> bool:
        """Let everything come home. Whether it did within the time."""
        home = wait_until(self._home, limit_s=limit_s)
        if home:
            for request in (*self._senders, *self._receivers):
                request.Free()
        return home

    def _home(self) -> bool:
        self.poke()
        for chunk, owed in enumerate(self._owed):
            if owed and self._receivers[chunk].Test():
                self._owed[chunk] = False
        return not (self._queue or self._sending or any(self._owed))

    @property
    def memory_bytes(self) -> int:
        """What the buffers take."""
        tensors: list[Any] = [*self._out, *self._back]
        return sum(tensor.nbytes for tensor in tensors)
