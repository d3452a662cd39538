"""A world in two levels: the ranks of each host, and one leader a host. Sums go up inside hosts, across by leaders, and down again."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from horovod_jobs.comm.world import Handle, World

if TYPE_CHECKING:
    from torch import Tensor


class Hierarchy:
    """Collective. The levels of ``world`` where it has several hosts of several ranks; otherwise ``flat``.

    Hosts need not have the same number of ranks. ``hosts`` gives the number of each rank's host instead of looking it up.

    Raises:
        SetupError: Horovod was started without dynamic process sets.
    """

    def __init__(self, world: World, *, hosts: Sequence[int] | None = None) -> None:
        if hosts is None:
            hosts = _look_up(world)
        self.world = world
        members = [[rank for rank in range(world.size) if hosts[rank] == host] for host in dict.fromkeys(hosts)]
        self.hosts, self.widest = len(members), max(map(len, members))
        self.flat = self.hosts == 1 or self.widest == 1
        self.leads = True
        if self.flat:
            return
        from horovod_jobs.comm.groups import Level, kept_set

        # Every rank adds every set, in the same order.
        sets = [kept_set(ranks) for ranks in members]
        leaders = [ranks[0] for ranks in members]
        across = kept_set(leaders)
        mine = next(number for number, ranks in enumerate(members) if world.rank in ranks)
        self.size_here = len(members[mine])
        self.leads = world.rank == leaders[mine]
        self._here = Level(members[mine], sets[mine])
        self._across = Level(leaders, across)

    def up(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective over this host's ranks. Start their sum."""
        return self._here.allreduce_async(tensor, name=f"{name}.up")

    def across(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective over the leaders. Start their sum."""
        return self._across.allreduce_async(tensor, name=f"{name}.across")

    def down(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective over this host's ranks. Start to hand out what the leader has; the others' tensor gives the shape."""
        return self._here.broadcast_async(tensor, name=f"{name}.down")


def _look_up(world: World) -> list[int]:
    if world.size == 1:
        return [0]
    from horovod_jobs.comm.groups import hosts_of

    mine = [socket.gethostname(), world.local_rank, world.local_size]
    return hosts_of([tuple(told) for told in world.gather_json(mine, name="hierarchy.hosts")])
