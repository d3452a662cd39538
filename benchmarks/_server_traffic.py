"""The traffic of a parameter server by typed MPI messages, without torch and without an optimizer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from mpi4py import MPI


class ServerTraffic:
    """Push and pull of one fp32 tensor, in chunks, by workers to servers: the first ranks serve, or all do (``servers=0``).

    A server adds a chunk's gradients when every worker's has come and sends the sum back at once, so that later pushes and earlier
    pulls are on their way at the same time. Chunks are dealt to servers in turn. Nothing is allocated in a call.
    """

    def __init__(self, *, size: int, servers: int, chunk_bytes: int) -> None:
        self._world = MPI.COMM_WORLD
        rank, ranks = self._world.rank, self._world.size
        self.rank = rank
        serving = list(range(servers)) if servers else list(range(ranks))
        self.workers = list(range(servers, ranks))
        count = max(1, chunk_bytes // 4)
        total = size // 4
        pieces = [(start, min(start + count, total)) for start in range(0, total, count)]
        if servers == 0 and len(pieces) < ranks:  # Every rank serves a part, however small the tensor.
            cuts = [total * index // ranks for index in range(ranks + 1)]
            pieces = [(a, b) for a, b in pairwise(cuts) if b > a]
        # A rank starts with the server after itself, so that no server gets all first chunks at once.
        order = sorted(range(len(pieces)), key=lambda index: (index // len(serving), (index - rank) % len(serving)))
        works = rank in self.workers
        self.gradient = np.ones(total, np.float32)
        self.answer = np.zeros(total, np.float32)
        self._sends, self._pulls = [], []
        self._parts: list[_Part] = []
        for index in order if works else []:
            server, (start, stop) = serving[index % len(serving)], pieces[index]
            if server != rank:
                self._pulls.append(self._world.Recv_init([self.answer[start:stop], MPI.FLOAT], server, 2 * index + 1))
                self._sends.append(self._world.Send_init([self.gradient[start:stop], MPI.FLOAT], server, 2 * index))
        if rank in serving:
            mine = [index for index in range(len(pieces)) if serving[index % len(serving)] == rank]
            self._parts = [_Part(self, index, *pieces[index], works=works) for index in mine]
        # All receives of pushes in one list: request number -> part.
        self._pushes = [request for part in self._parts for request in part.pushes]
        self._owner = [part for part in self._parts for _ in part.pushes]

    def call(self) -> None:
        """One push and pull, to its end on this rank."""
        if self._pulls:
            MPI.Prequest.Startall(self._pulls)
        if self._pushes:
            MPI.Prequest.Startall(self._pushes)
        if self._sends:
            MPI.Prequest.Startall(self._sends)
        for part in self._parts:
            part.begin()
        for _ in self._pushes:
            self._owner[MPI.Request.Waitany(self._pushes)].arrived()
        MPI.Request.Waitall(self._sends)
        MPI.Request.Waitall(self._pulls)
        for part in self._parts:
            part.end()

    def correct(self) -> bool:
        """Whether every worker has the sum of the workers' ones."""
        return self.rank not in self.workers or bool((self.answer == len(self.workers)).all())

    def slowest(self, value: float) -> float:
        found = np.array([value])
        self._world.Allreduce(MPI.IN_PLACE, found, op=MPI.MAX)
        return float(found[0])

    def meet(self) -> None:
        self._world.Barrier()


class _Part:
    """One chunk on its server."""

    def __init__(self, traffic: ServerTraffic, index: int, start: int, stop: int, *, works: bool) -> None:
        world, rank = MPI.COMM_WORLD, traffic.rank
        others = [worker for worker in traffic.workers if worker != rank]
        others = others[rank % max(len(others), 1) :] + others[: rank % max(len(others), 1)]
        self._sum = np.zeros(stop - start, np.float32)
        self._received = [np.zeros(stop - start, np.float32) for _ in others]
        self.pushes = [
            world.Recv_init([buffer, MPI.FLOAT], worker, 2 * index)
            for buffer, worker in zip(self._received, others, strict=True)
        ]
        self._answers = [world.Send_init([self._sum, MPI.FLOAT], worker, 2 * index + 1) for worker in others]
        self._own = (traffic.gradient[start:stop], traffic.answer[start:stop]) if works else None
        self._missing = 0

    def begin(self) -> None:
        self._missing = len(self.pushes)
        if not self._missing:
            self._complete()

    def arrived(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._complete()

    def _complete(self) -> None:
        terms = [*self._received, *([self._own[0]] if self._own else [])]
        np.copyto(self._sum, terms[0])
        for term in terms[1:]:
            np.add(self._sum, term, out=self._sum)
        if self._answers:
            MPI.Prequest.Startall(self._answers)
        if self._own:
            np.copyto(self._own[1], self._sum)

    def end(self) -> None:
        MPI.Request.Waitall(self._answers)
