"""What a server holds of a training stage, and when it applies what workers push (its consistency)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.strategy.parameter_server.protocol import Room, pack_rows, unpack_rows

_PIECE = 65536  # elements
Reply = Callable[["Shard", int], None]  # send what a shard holds to this worker


class Shard(ABC):
    """Parameters at their server, with their optimizer. None: weights are averaged, the workers step."""

    def __init__(
        self, index: int, group: int, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer | None, *, workers: int
    ) -> None:  # fmt: skip
        self.index, self.group, self.parameter, self.optimizer = index, group, parameter, optimizer
        self.arrived: set[int] = set()  # workers whose push waits for the others'
        self.total: Tensor | None = None  # what all pushed, until it is applied
        self.counts = [0] * workers  # pushes applied, by worker
        self.read_at = [0] * workers  # updates there were when each worker read last
        self.updates = 0

    @abstractmethod
    def one(self, worker: int) -> Tensor:
        """A worker's last push."""

    @abstractmethod
    def combine(self, *, mean: bool) -> Tensor:
        """The sum of all workers' last pushes, in the order of workers."""

    @abstractmethod
    def apply(self, pushed: Tensor) -> None:
        """One update."""

    def forget(self, worker: int) -> None:  # noqa: B027
        """Keep nothing for a worker that has died."""


class Flat(Shard):
    """A chunk: a flat range of parameters, and a buffer for each worker, which travels both ways."""

    def __init__(self, *arguments: Any, workers: int, shared: bool) -> None:
        super().__init__(*arguments, workers=workers)
        self.buffers = [torch.empty_like(self.parameter.detach()) for _ in range(workers)]
        self._shared = shared

    def one(self, worker: int) -> Tensor:
        return self.buffers[worker]

    def combine(self, *, mean: bool) -> Tensor:
        total = self.buffers[0]
        for other in self.buffers[1:]:
            total.add_(other)
        return total.div_(len(self.buffers)) if mean else total

    def apply(self, pushed: Tensor) -> None:
        if self.optimizer is None:
            with torch.no_grad():
                self.parameter.copy_(pushed)
        else:
            self.parameter.grad = pushed
            self.optimizer.step()
            self.parameter.grad = None
        self.updates += 1

    def outgoing(self, worker: int) -> Tensor:
        """What to send to a worker.

        The parameters themselves where they change again only after every worker has read them and pushed again (``shared``);
        else a copy, because another worker's push changes them while this is on its way.
        """
        return self.parameter.detach() if self._shared else self.buffers[worker].copy_(self.parameter.detach())


class Table(Shard):
    """Rows of an embedding. Only rows that were touched travel: gradients up, and down those changed since a worker's last read."""

    def __init__(self, *arguments: Any, workers: int) -> None:
        super().__init__(*arguments, workers=workers)
        self._pushed: list[Tensor] = [torch.zeros(0, dtype=torch.uint8)] * workers  # packed numbers and rows
        self._in, self._out = [Room() for _ in range(workers)], [Room() for _ in range(workers)]
        self._changed: list[deque[Tensor]] = [deque() for _ in range(workers)]

    def take(self, worker: int, nbytes: int) -> Tensor:
        """Where a worker's push is to be read to."""
        self._pushed[worker] = self._in[worker].of(nbytes)
        return self._pushed[worker]

    def one(self, worker: int) -> Tensor:
        return self._sparse([self._pushed[worker]])

    def combine(self, *, mean: bool) -> Tensor:
        return self._sparse(self._pushed)

    def _sparse(self, messages: Sequence[Tensor]) -> Tensor:
        dim, dtype = self.parameter.shape[1], self.parameter.dtype
        parts = [unpack_rows(message, dim=dim, dtype=dtype) for message in messages]
        ids, rows = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return torch.sparse_coo_tensor(ids[None], rows, self.parameter.shape, check_invariants=True).coalesce()

    def apply(self, pushed: Tensor) -> None:
        assert self.optimizer is not None
        self.parameter.grad = pushed
        # Checked, not assumed: a row that is not there would write into other memory. It costs a look at the numbers of the rows.
        with torch.sparse.check_sparse_tensor_invariants(True):
            self.optimizer.step()
        self.parameter.grad = None
        self.updates += 1
        for changed in self._changed:
            changed.append(pushed.indices()[0])

    def forget(self, worker: int) -> None:
        self._changed[worker] = deque(maxlen=0)

    def outgoing(self, worker: int) -> Tensor:
        """Numbers and values of the rows that have changed since this worker read."""
        changed = self._changed[worker]
        ids = torch.unique(torch.cat(list(changed))) if changed else torch.zeros(0, dtype=torch.int64)
        changed.clear()
        return pack_rows(ids, self.parameter.detach(), ids, self._out[worker])


def _values(total: Tensor) -> Tensor:
    return total.values() if total.is_sparse else total


def squared_norm(total: Tensor) -> float:
    """Of a gradient, in pieces that are added up in float64: so precise, and nothing as large as the gradient is made."""
    return sum(_squared(piece) for piece in _values(total).reshape(-1).split(_PIECE))


def _squared(piece: Tensor) -> float:
    if piece.dtype in (torch.float32, torch.float64):
        found = float(torch.dot(piece, piece))
        if math.isfinite(found):  # Else squares of a single float32 may have been too large for it.
            return found
    return float(piece.double().square().sum())


class Consistency(ABC):
    """Decides when a push is applied and when its worker may read."""

    def __init__(
        self, shards: Sequence[Shard], *, workers: int, options: Callable[[Shard, int], dict[str, Any]], reply: Reply
    ) -> None:
        self.shards, self.workers = list(shards), workers
        self._options, self._reply = options, reply
        self.read_staleness: Counter[int] = Counter()  # steps of the slowest worker that a read did not see
        self.update_staleness: Counter[int] = Counter()  # updates between a worker's read and its push

    @abstractmethod
    def pushed(self, shard: Shard, worker: int) -> None:
        """A worker's new push has been read."""

    @abstractmethod
    def drop(self, worker: int) -> bool:
        """Go on without a worker that has died. Whether that is possible."""

    def _apply(self, shard: Shard, pushed: Tensor, worker: int) -> None:
        if shard.optimizer is not None:
            shard.optimizer.param_groups[0].update(self._options(shard, worker))
        shard.apply(pushed)


class Sync(Consistency):
    """One update of what all workers pushed, added up in the order of workers; all read it.

    ``mean``: weights are averaged. ``clip``: nothing is applied before ``norm_known`` tells how much to scale.
    """

    def __init__(self, *arguments: Any, mean: bool, on_complete: Callable[[float], None] | None, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._mean, self._on_complete = mean, on_complete
        self._complete = 0

    def pushed(self, shard: Shard, worker: int) -> None:
        shard.arrived.add(worker)
        if len(shard.arrived) < self.workers:
            return
        shard.total = shard.combine(mean=self._mean)
        if self._on_complete is None:
            self._finish(shard)
            return
        self._complete += 1
        if self._complete == len(self.shards):
            self._complete = 0
            self._on_complete(sum(squared_norm(one.total) for one in self.shards if one.total is not None))

    def drop(self, worker: int) -> bool:
        """An update is of all workers or of none."""
        return False

    def norm_known(self, scale: float) -> None:
        """Apply what has been held back, ``scale`` times as long."""
        for shard in self.shards:
            assert shard.total is not None
            _values(shard.total).mul_(scale)
            self._finish(shard)

    def _finish(self, shard: Shard) -> None:
        assert shard.total is not None
        shard.arrived.clear()
        self._apply(shard, shard.total, 0)
        shard.total = None
        for worker in range(self.workers):
            shard.counts[worker] += 1
            self.read_staleness[0] += 1
            self._reply(shard, worker)


class Bounded(Consistency):
    """Every push is applied at once. A worker with t pushes reads when every worker has made t - staleness (Ho et al. 2013, SSP).

    ``staleness`` None: no bound (asynchronous, Dean et al. 2012). ``mean``: a push of weights moves the average by 1/workers of
    the way.
    """

    def __init__(self, *arguments: Any, staleness: int | None, mean: bool, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._staleness, self._mean = staleness, mean
        self._there = set(range(self.workers))
        self._waiting: dict[int, set[int]] = {shard.index: set() for shard in self.shards}

    def pushed(self, shard: Shard, worker: int) -> None:
        self.update_staleness[shard.updates - shard.read_at[worker]] += 1
        if self._mean:
            with torch.no_grad():
                shard.parameter.lerp_(shard.one(worker), 1.0 / len(self._there))
            shard.updates += 1
        else:
            self._apply(shard, shard.one(worker), worker)
        shard.counts[worker] += 1
        self._waiting[shard.index].add(worker)
        self._let_read(shard)

    def drop(self, worker: int) -> bool:
        """Nobody waits for it any more."""
        self._there.discard(worker)
        for shard in self.shards:
            shard.forget(worker)
            self._waiting[shard.index].discard(worker)
            self._let_read(shard)
        return True

    def _let_read(self, shard: Shard) -> None:
        waiting, slowest = self._waiting[shard.index], min((shard.counts[one] for one in self._there), default=0)
        for reader in sorted(waiting, key=lambda one: shard.counts[one]):
            if self._staleness is None or slowest >= shard.counts[reader] - self._staleness:
                waiting.discard(reader)
                self._read(shard, reader, slowest)

    def _read(self, shard: Shard, worker: int, slowest: int) -> None:
        self.read_staleness[shard.counts[worker] - slowest] += 1
        shard.read_at[worker] = shard.updates
        self._reply(shard, worker)
