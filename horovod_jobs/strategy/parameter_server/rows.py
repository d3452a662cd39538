"""Embeddings with sparse gradients: only rows that were touched travel, both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from horovod_jobs.comm.channel import Wire, wait_until
from horovod_jobs.strategy.parameter_server import protocol
from horovod_jobs.strategy.parameter_server.protocol import Room


@dataclass(frozen=True)
class Slices:
    """A table ``[rows, dim]`` dealt to servers row by row: row r is row ``r // servers`` of server ``r % servers``."""

    index: int  # of its messages
    group: int
    parameter: nn.Parameter
    servers: int

    def of(self, tensor: Tensor, server: int) -> Tensor:
        """A server's rows of the table, or of what is shaped like it."""
        return tensor[server :: self.servers]

    def shape(self, server: int) -> tuple[int, int]:
        """Rows and columns at a server."""
        rows, dim = self.parameter.shape
        return len(range(server, rows, self.servers)), int(dim)


def sparse_parameters(model: nn.Module | None) -> set[int]:
    """Ids of the parameters whose gradients are sparse: of torch's embeddings with ``sparse=True``."""
    if model is None:
        return set()
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds) and module.sparse}


class RowCourier:
    """Sends the touched rows' gradients, and receives the rows that anybody has changed since.

    Every worker holds the whole table and is told of every change, so nobody has to know what the next batch needs.
    """

    def __init__(
        self, up: Wire, down: Wire, tables: Sequence[Slices], *, servers: Sequence[int], check: Callable[[], None]
    ) -> None:
        self._up, self._down, self._tables, self._servers, self._check = up, down, list(tables), list(servers), check
        self._owed = [False] * len(self._tables)
        self._sending: dict[tuple[int, int], Any] = {}  # by table and server
        self._out = [[Room() for _ in self._servers] for _ in self._tables]
        self._in = Room()

    def push(self, number: int, grad: Tensor | None, *, guard: bool) -> bool:
        """Push a table's gradient, once a step. ``guard``: nothing goes where it is not finite. Whether it went."""
        self.fetch(number)  # Where no forward pass has needed it since.
        table = self._tables[number]
        ids, rows = _parts(grad, table.parameter)
        sound = not guard or bool(torch.isfinite(rows.sum()))
        if not sound:
            ids, rows = ids[:0], rows[:0]
        for server, rank in enumerate(self._servers):
            if (number, server) in self._sending:  # Read long ago, since the answer is here; MPI wants to be asked.
                wait_until(self._sending[number, server].Test)
            mine = (ids % table.servers == server).nonzero().view(-1)
            packed = protocol.pack_rows(ids[mine] // table.servers, rows, mine, self._out[number][server])
            self._sending[number, server] = self._up.send(packed, to=rank, tag=protocol.tag(table.index))
        self._owed[number] = True
        return sound

    def expect_all(self) -> None:
        """Be ready to receive what has changed in every table, which the servers are asked for."""
        self._owed = [True] * len(self._tables)

    @torch.no_grad()
    def fetch(self, number: int) -> None:
        """Wait until a table's changes are here, and take them over."""
        if not self._owed[number]:
            return
        table = self._tables[number]
        for server, rank in enumerate(self._servers):
            message = self._down.next_from(rank, protocol.tag(table.index), poke=self._check)
            packed = self._in.of(message.nbytes)
            message.read(packed)
            ids, rows = protocol.unpack_rows(packed, dim=table.parameter.shape[1], dtype=table.parameter.dtype)
            device = table.parameter.device
            table.parameter.index_copy_(0, (ids * table.servers + server).to(device), rows.to(device))
        self._owed[number] = False

    def close(self, *, limit_s: float) -> bool:
        """Let everything come home. Whether it did within the time."""
        for number, table in enumerate(self._tables):
            for rank in self._servers if self._owed[number] else ():
                arrived = wait_until(lambda rank=rank, table=table: self._drop(rank, table), limit_s=limit_s)  # type: ignore[misc]
                if not arrived:
                    return False
            self._owed[number] = False
        return all(wait_until(request.Test, limit_s=limit_s) for request in self._sending.values())

    def _drop(self, rank: int, table: Slices) -> bool:
        self._check()
        message = self._down.probe_from(rank, protocol.tag(table.index))
        if message is not None:
            message.read(self._in.of(message.nbytes))
        return message is not None


def _parts(grad: Tensor | None, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers ``[n]`` and values ``[n, dim]`` of a gradient, each row once, in host memory."""
    if grad is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, parameter.shape[1], dtype=parameter.dtype)
    if not grad.is_sparse:  # The model also used the weights in another way.
        grad = grad.to_sparse(1)
    grad = grad.coalesce()
    return grad.indices()[0].cpu(), grad.values().cpu()
