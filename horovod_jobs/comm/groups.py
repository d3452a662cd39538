"""Parts of the world: each is a world of its own for one stage, while the other ranks make other stages.

Its collectives go through a Horovod process set; on MPI small blocking reductions take a split communicator, as the whole world's
take the whole one. A part of one rank needs neither.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
from torch import Tensor

from horovod_jobs.comm.horovod_world import HorovodWorld, _Pending, _wire
from horovod_jobs.comm.world import Handle, SingleWorld, World
from horovod_jobs.errors import SetupError


def hosts_of(told: Sequence[tuple[str, int, int]]) -> list[int]:
    """The number of each rank's host, from what each rank says: host name, local rank, local size.

    A launcher may count one machine as several hosts, so a name alone does not tell.
    """
    hosts: list[tuple[str, int, set[int]]] = []
    found = []
    for name, local_rank, local_size in told:
        for number, (its_name, its_size, taken) in enumerate(hosts):
            if (its_name, its_size) == (name, local_size) and local_rank not in taken:
                taken.add(local_rank)
                found.append(number)
                break
        else:
            hosts.append((name, local_size, {local_rank}))
            found.append(len(hosts) - 1)
    return found


def _place(part: World, whole: World, ranks: Sequence[int], hosts: Sequence[int]) -> None:
    """Fill in who this rank is in its part."""
    own = [hosts[rank] for rank in ranks]
    numbers = list(dict.fromkeys(own))
    part.ranks = tuple(ranks)
    part.rank, part.size = ranks.index(whole.rank), len(ranks)
    part.local_rank, part.local_size = whole.local_rank, whole.local_size
    part.host_rank = own[: part.rank].count(own[part.rank])
    part.host_size = own.count(own[part.rank])
    part.cross_rank, part.cross_size = numbers.index(own[part.rank]), len(numbers)


class _One(SingleWorld):
    """A part of one rank: nobody to talk to."""


class Part(HorovodWorld):
    """A part of several ranks."""

    def __init__(
        self, whole: World, ranks: Sequence[int], *, hosts: Sequence[int], process_set: Any, direct: Any
    ) -> None:
        self.controller, self.roles = whole.controller, None
        self._set, self._direct = process_set, direct
        _place(self, whole, ranks, hosts)

    def shutdown(self) -> None:
        """A part is left by closing the split; the whole world is shut down."""


class Split:
    """Collective. The whole world's ranks in parts; ``mine`` is the part that this rank is in.

    Raises:
        SetupError: Horovod was started without dynamic process sets.
    """

    def __init__(self, whole: World, parts: Sequence[Sequence[int]]) -> None:
        assert isinstance(whole, HorovodWorld), "a world of one is not split"
        hosts = hosts_of(
            [
                tuple(told)
                for told in whole.gather_json(
                    [socket.gethostname(), whole.local_rank, whole.local_size], name="split.hosts"
                )
            ]
        )
        # Every rank adds every set, in the same order: Horovod numbers them by it.
        self._sets = {tuple(ranks): _set_of(ranks) for ranks in parts if len(ranks) > 1}
        number = next(number for number, ranks in enumerate(parts) if whole.rank in ranks)
        channel = whole._direct
        self._direct = None if channel is None else channel.Split(number, whole.rank)
        ranks = tuple(parts[number])
        self.mine: World
        if len(ranks) == 1:
            self.mine = _One()
            _place(self.mine, whole, ranks, hosts)
        else:
            self.mine = Part(whole, ranks, hosts=hosts, process_set=self._sets[ranks], direct=self._direct)

    def close(self) -> None:
        """Collective, of the whole world. Take the sets and communicators back."""
        if self._direct is not None:
            self._direct.Free()
        for ranks, process_set in self._sets.items():
            if ranks not in _KEPT:
                hvd.remove_process_set(process_set)


_KEPT: dict[tuple[int, ...], Any] = {}


def kept_set(ranks: Sequence[int]) -> Any:
    """Collective, of the whole world. The process set of these ranks, which stays for as long as the process lives.

    Raises:
        SetupError: Horovod was started without dynamic process sets.
    """
    return _KEPT.setdefault(tuple(ranks), _set_of(ranks))


def _set_of(ranks: Sequence[int]) -> Any:
    # Horovod has at most one set of the same ranks.
    found = _KEPT.get(tuple(ranks))
    return found if found is not None else _add(ranks)


class Level:
    """The collectives of a hierarchy's level, in Horovod's background thread."""

    def __init__(self, ranks: Sequence[int], process_set: Any) -> None:
        self._root, self._set = ranks[0], process_set

    def allreduce_async(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective over the level's ranks. Start their sum."""
        handle = hvd.allreduce_async(_wire(tensor), name=name, op=hvd.Sum, process_set=self._set)
        return _Pending(handle, tensor, tuple(tensor.shape), name=name)

    def broadcast_async(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective over the level's ranks. Start to hand out the first one's tensor."""
        handle = hvd.broadcast_async(_wire(tensor), self._root, name=name, process_set=self._set)
        return _Pending(handle, tensor, tuple(tensor.shape), name=name)


def _add(ranks: Sequence[int]) -> Any:
    try:
        return hvd.add_process_set(hvd.ProcessSet(list(ranks)))
    except ValueError as error:
        raise SetupError(
            f"Horovod cannot form a process set of ranks {list(ranks)} ({str(error).strip().splitlines()[0]}); start the job with "
            "HOROVOD_DYNAMIC_PROCESS_SETS=1 in its environment"
        ) from error
