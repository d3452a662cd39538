"""Where every parameter lies: flat buffers, cut into chunks, dealt to servers so that each holds as many bytes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

_SMALLEST_BYTES = 4096
_ALIGN = 16  # elements


@dataclass(frozen=True)
class Place:
    """A parameter's range in its flat buffer."""

    buffer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """A range of a flat buffer that travels as one message. Lower numbers are needed earlier in the forward pass."""

    index: int
    buffer: int
    start: int
    stop: int
    server: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """``buffers[i]`` is (parameter group, dtype, elements); ``places[p]`` is where parameter ``p`` lies."""

    buffers: tuple[tuple[int, torch.dtype, int], ...]
    places: tuple[Place, ...]
    chunks: tuple[Chunk, ...]
    servers: int

    def nbytes(self, chunk: Chunk) -> int:
        return chunk.numel * self.buffers[chunk.buffer][1].itemsize

    def chunks_of(self, parameter: int) -> list[int]:
        """The chunks that hold a part of a parameter."""
        return self._held[0][parameter]

    def parameters_of(self, chunk: int) -> list[int]:
        """The parameters that have a part of a chunk."""
        return self._held[1][chunk]

    @cached_property
    def _held(self) -> tuple[list[list[int]], list[list[int]]]:
        chunks: list[list[int]] = [[] for _ in self.places]
        parameters: list[list[int]] = [[] for _ in self.chunks]
        for index, place in enumerate(self.places):
            for chunk in self.chunks:
                if chunk.buffer == place.buffer and chunk.start < place.stop and place.start < chunk.stop:
                    chunks[index].append(chunk.index)
                    parameters[chunk.index].append(index)
        return chunks, parameters

    def load_bytes(self) -> list[int]:
        """Bytes of parameters at each server."""
        load = [0] * self.servers
        for chunk in self.chunks:
            load[chunk.server] += self.nbytes(chunk)
        return load


def make_layout(parameters: Sequence[tuple[int, torch.dtype, int]], *, servers: int, chunk_bytes: int) -> Layout:
    """The layout of parameters given as (group, dtype, elements), in the order in which the forward pass needs them.

    Neighbours of one group and dtype share a chunk up to ``chunk_bytes``; a larger tensor is cut into equal chunks. Small models get
    smaller chunks, so that every server has some. Chunks are dealt largest first to the server with the least bytes: loads differ by
    at most one chunk.
    """
    total = sum(numel * dtype.itemsize for _, dtype, numel in parameters)
    limit = min(chunk_bytes, max(_SMALLEST_BYTES, -(-total // (2 * servers))))
    keys: dict[tuple[int, torch.dtype], int] = {}
    sizes: list[int] = []
    places: list[Place] = []
    for group, dtype, numel in parameters:
        buffer = keys.setdefault((group, dtype), len(keys))
        if buffer == len(sizes):
            sizes.append(0)
        places.append(Place(buffer, sizes[buffer], sizes[buffer] + numel))
        sizes[buffer] += numel
    ranges: list[tuple[int, int, int, int]] = []  # first parameter, buffer, start, stop
    for (_, dtype), buffer in keys.items():
        inside = [
            (index, place) for index, place in enumerate(places) if place.buffer == buffer and place.start < place.stop
        ]
        ranges += [(first, buffer, start, stop) for first, start, stop in _cut(inside, limit=limit // dtype.itemsize)]
    ranges.sort()
    buffers = tuple((group, dtype, sizes[buffer]) for (group, dtype), buffer in keys.items())
    weights = [(stop - start) * buffers[buffer][1].itemsize for _, buffer, start, stop in ranges]
    owners = deal(weights, servers=servers)
    chunks = tuple(
        Chunk(index, buffer, start, stop, owners[index]) for index, (_, buffer, start, stop) in enumerate(ranges)
    )
    return Layout(buffers, tuple(places), chunks, servers)


def _cut(places: Sequence[tuple[int, Place]], *, limit: int) -> list[tuple[int, int, int]]:
    """(first parameter, start, stop) of the chunks of one buffer; no chunk has more than ``limit`` elements."""
    found: list[tuple[int, int, int]] = []
    first, start, stop = 0, 0, 0  # the chunk that is still open
    for index, place in places:
        numel = place.stop - place.start
        if stop > start and stop - start + numel > limit:
            found.append((first, start, stop))
            start = stop
        if numel > limit:
            parts = -(-numel // limit)
            step = min(limit, (numel // parts // _ALIGN + 1) * _ALIGN)
            for at in range(place.start, place.stop, step):
                found.append((index, at, min(at + step, place.stop)))
            start = stop = place.stop
            continue
        if stop == start:
            first = index
        stop = place.stop
    if stop > start:
        found.append((first, start, stop))
    return found


def deal(weights: Sequence[int], *, servers: int) -> list[int]:
    """A server for each weight: the largest first, to whoever has the least (Graham 1969)."""
    load, owners = [0] * servers, [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        owner = min(range(servers), key=lambda server: (load[server], server))
        owners[index] = owner
        load[owner] += weights[index]
    return owners
