"""A world that a rank may leave by dying: MPI with ULFM (Bland et al. 2013, doi:10.1177/1094342013488238) and no Horovod.

Horovod's background thread holds a collective of all its ranks in every cycle, so one that dies ends it for all. Where workers of a
parameter server go on without one, what they still do together goes through MPI alone: the figures of a validation, the pieces
of a checkpoint. ``mpirun --with-ft ulfm`` gives an error in the place of an end of the whole job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from horovod_jobs.comm.channel import as_bytes, is_loss, wait_until
from horovod_jobs.comm.roles import Roles
from horovod_jobs.comm.world import GradientExchange, Handle, World, _Done
from horovod_jobs.errors import ConfigError, WorldError

T = TypeVar("T")
_MEET = 1  # the tag of who has come to a collective
_OPS = {"sum": MPI.SUM, "average": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
_AS = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.bool: torch.uint8}  # what MPI cannot add up


class _Smaller(Exception):  # noqa: N818
    """Ranks have died, and the world is what is left."""


def _meet(comm: Any) -> None:
    """Collective. A barrier (Hensgen et al. 1988, dissemination) that waits politely, and fails without a word on standard error."""
    rank, size, nothing = comm.Get_rank(), comm.Get_size(), bytearray(0)
    step = 1
    while step < size:
        requests = [
            comm.Irecv([nothing, MPI.BYTE], (rank - step) % size, _MEET),
            comm.Isend([nothing, MPI.BYTE], (rank + step) % size, _MEET),
        ]
        for request in requests:
            wait_until(request.Test)
        step *= 2


class SurvivingWorld(World):
    """The workers of a parameter server that need no lock step.

    Every collective ends with an agreement on whether it went well for all (``MPI_Comm_agree``), so the ranks that are left never differ
    about which one they are in. Within ``steady`` a loss makes the world smaller and the work in it is done again; elsewhere, or where
    rank 0 has died, it is an error on every rank.
    """

    def __init__(self, roles: Roles) -> None:
        """Collective over the workers."""
        self.controller, self.roles = "mpi", roles
        self._comm = roles.workers.Dup()
        self._last = self._comm.Dup()
        self._error: WorldError | None = None
        self._steady = False
        self._numbers = tuple(range(self._comm.Get_size()))  # of the ranks in ``_comm``, in the world as it began
        self._place(self._numbers)
        hosts = self._hosts_of(self._numbers)
        self.local_rank, self.local_size = hosts[: self.rank].count(hosts[self.rank]), hosts.count(hosts[self.rank])

    def _hosts_of(self, ranks: Sequence[int]) -> list[str]:
        return [self.roles.hosts[rank] for rank in ranks]  # Workers come first: their numbers are those of the whole.

    def _place(self, ranks: tuple[int, ...]) -> None:
        """Fill in who this rank is among those that are left."""
        hosts = self._hosts_of(ranks)
        names = list(dict.fromkeys(hosts))
        self.ranks, self.rank, self.size = ranks, self._comm.Get_rank(), len(ranks)
        self.host_rank, self.host_size = hosts[: self.rank].count(hosts[self.rank]), hosts.count(hosts[self.rank])
        self.cross_rank, self.cross_size = names.index(hosts[self.rank]), len(names)

    # --- losses -----------------------------------------------------------------------------------------------------
    def expect_losses(self, expected: bool) -> None:
        self.roles.watch.endures = expected

    def steady(self, fn: Callable[[], T]) -> T:
        if self._steady:
            return fn()  # Who called this is who begins again.
        while True:
            self._steady = True
            try:
                return fn()
            except _Smaller:
                continue
            finally:
                self._steady = False

    def _together(self, collective: Callable[[Any], T]) -> T:
        """Run a collective that went well on every rank or counts on none."""
        if self._error is not None:
            raise self._error
        result, well = None, True
        try:
            # Who waits for a slow rank must not burn a core that it shares with it: the collective itself would.
            _meet(self._comm)
            result = collective(self._comm)
        except MPI.Exception as error:
            if not is_loss(error):
                raise
            well = False
            self._comm.Revoke()  # Else some would wait for ever for those who have heard of the loss.
        try:
            well = bool(self._comm.Agree(int(well)))
        except MPI.Exception as error:
            if not is_loss(error):
                raise
            well = False  # The same on every rank: an agreement that a death disturbs fails for all.
        if not well:
            self._shrink()
        return result  # type: ignore[return-value]

    def _shrink(self) -> None:
        self._comm.Revoke()
        smaller = self._comm.Shrink()
        left = tuple(self.ranks[rank] for rank in smaller.group.Translate_ranks(None, self._comm.group))
        gone = [rank for rank in self.ranks if rank not in left]
        self._comm = smaller
        with contextlib.suppress(MPI.Exception):  # Who has died since then is found by the next collective.
            self._last = smaller.Dup()
        told = [{"rank": rank, "host": self.roles.hosts[rank]} for rank in gone]
        if not self._steady or (left and left[0] != self.ranks[0]):
            names = " and ".join(f"rank {one['rank']} on {one['host']}" for one in told) or "a rank"
            self._error = WorldError(f"{names} has ended; the same command goes on from the last checkpoint")
            raise self._error
        self.lost = (*self.lost, *told)
        self.roles.watch.tolerate(gone)
        self.roles.worker_ranks = left
        self._place(left)
        raise _Smaller

    # --- collectives ------------------------------------------------------------------------------------------------
    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        if op not in _OPS:
            raise ConfigError(f"strategy.op={op} needs a world that Horovod makes; use strategy.op=sum")
        own = tensor.detach().to("cpu", _AS.get(tensor.dtype, tensor.dtype)).contiguous()

        def reduce(comm: Any) -> Tensor:
            total = own.clone()
            comm.Allreduce(MPI.IN_PLACE, total.numpy(), op=_OPS[op])
            return total / comm.Get_size() if op == "average" else total

        return _Done(self._together(reduce).to(tensor.device, tensor.dtype))

    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        own = tensor.detach().cpu().contiguous()

        def gather(comm: Any) -> Tensor:
            whole = own.new_empty(comm.Get_size(), *own.shape)
            comm.Allgather([as_bytes(own), MPI.BYTE], [as_bytes(whole), MPI.BYTE])
            return whole

        return _Done(self._together(gather).to(tensor.device))

    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        if tensor.numel() == 0:
            return tensor.clone()
        own = tensor.detach().to("cpu", copy=True).contiguous()

        def hand_out(comm: Any) -> Tensor:
            comm.Bcast([as_bytes(own), MPI.BYTE], root=root)
            return own

        return self._together(hand_out).to(tensor.device)

    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        def gather(comm: Any) -> list[bytes]:
            sizes = np.zeros(comm.Get_size(), dtype=np.int64)
            comm.Allgather(np.array([len(value)], dtype=np.int64), sizes)
            joined = bytearray(int(sizes.sum()))
            comm.Allgatherv([value, MPI.BYTE], [joined, sizes.tolist(), MPI.BYTE])
            ends = [0, *sizes.cumsum().tolist()]
            return [bytes(joined[ends[rank] : ends[rank + 1]]) for rank in range(len(sizes))]

        return self._together(gather)

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
        predivide: float = 1.0,
    ) -> GradientExchange:
        raise ConfigError(
            "this world goes on without ranks that die, and has no Horovod to sum gradients with; use "
            "strategy=parameter_server in every training stage of the job, or strategy.consistency=sync"
        )

    @property
    def bereaved(self) -> bool:
        return bool(self.roles.obituary())

    def farewell(self) -> None:
        # Apart from all else: a rank with an error of its own must not be taken for one that came to what the others do next.
        _meet(self._last)

    def shutdown(self) -> None:
        # The job is over, well or not: a loss from here on is nobody's error, and one before has been told.
        if self._error is None:
            with contextlib.suppress(WorldError):
                self.steady(lambda: self.barrier(name="surviving.shutdown"))
        self.roles.dismiss()
        self.roles.watch.stop()
