"""Worlds inside the world that a test runs in: some of its ranks work, some serve parameters, the rest look on. Real MPI, no Horovod."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor

from horovod_jobs.comm.roles import Roles
from horovod_jobs.comm.world import GradientExchange, Handle, World
from horovod_jobs.strategy.parameter_server.server import Server
from horovod_jobs.strategy.parameter_server.stage import Seat

T = TypeVar("T")
_OPS = {"sum": MPI.SUM, "average": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}


class _Done:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class SubWorld(World):
    """The workers of some roles."""

    controller = "mpi"

    def __init__(self, roles: Roles) -> None:
        self.roles, self._comm = roles, roles.workers.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.local_rank, self.local_size = self.rank, self.size

    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        result = tensor.detach().contiguous().clone()
        self._comm.Allreduce(MPI.IN_PLACE, result.numpy(), op=_OPS[op])
        return _Done(result / self.size if op == "average" else result)

    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        result = tensor.detach().contiguous().clone()
        self._comm.Bcast([result.view(-1).view(torch.uint8).numpy(), MPI.BYTE], root)
        return result

    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        sizes = torch.zeros(self.size, dtype=torch.int64)
        self._comm.Allgather([torch.tensor([len(value)]).numpy(), MPI.INT64_T], [sizes.numpy(), MPI.INT64_T])
        joined = bytearray(int(sizes.sum()))
        counts = sizes.tolist()
        self._comm.Allgatherv([value, MPI.BYTE], [joined, counts, MPI.BYTE])
        parts, at = [], 0
        for count in counts:
            parts.append(bytes(joined[at : at + count]))
            at += count
        return parts

    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        raise NotImplementedError("these worlds are for the parameter server")

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
        **rest: Any,
    ) -> GradientExchange:
        raise NotImplementedError("these worlds are for the parameter server")


def within(world: World, fn: Callable[[SubWorld], T], *, workers: int, servers: int = 0) -> T | None:
    """Collective. ``fn`` on the first ``workers`` ranks, as a world; the next ``servers`` ranks serve; the others wait.

    Gives ``fn``'s result where it ran. What it raises on a worker is raised on every rank.
    """
    inside = world.rank < workers + servers
    comm = MPI.COMM_WORLD.Split(int(inside), world.rank)
    result: T | None = None
    with world.agreed("test.within"):
        if inside:
            try:
                result = _play(Roles(comm, servers=servers), fn)
            except Exception:
                traceback.print_exc()  # Now: where ranks cannot agree any more, the test runs out of time.
                raise
    assert not [thread for thread in threading.enumerate() if thread.name == "parameter-server"], "none is left"
    comm.Free()
    return result


def _play(roles: Roles, fn: Callable[[SubWorld], T]) -> T | None:
    if roles.is_server:
        up, down = roles.wires()
        Server(Seat(up, down, roles.rank, roles.worker_ranks, roles.server_ranks, ("tests",))).serve()
        return None
    try:
        return fn(SubWorld(roles))
    finally:
        roles.dismiss()
