"""Hierarchical all-reduce: summed inside each host, between the hosts' leaders, and handed out inside each host.

The three phases of Goyal et al. 2017, arXiv:1706.02677, section 4, with one leader a host. Between H hosts the leaders' ring has
2(H - 1) steps, where the ring of all N ranks has 2(N - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.comm.hierarchy import Hierarchy
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import Method, Rounds, Slot, Wire

if TYPE_CHECKING:
    from torch import Tensor


def in_levels(method: Method | None, *, compression: Any) -> Method:
    """The method of ``strategy.hierarchical=true``.

    Raises:
        ConfigError: another method is chosen as well, or half precision.
    """
    if method is not None or compression != "none":
        chosen = compression if method is None else method.name
        raise ConfigError(
            f"strategy.hierarchical=true sums whole gradients, and {chosen} is chosen as well; use strategy.compression=none and "
            "strategy.op=sum, or strategy.hierarchical=false"
        )
    return Hierarchical()


class Hierarchical(Method):
    """The sum in two levels; on one host, or with one rank a host, the flat sum.

    Args:
        hosts: the number of each rank's host; None: as it is found.
    """

    name: ClassVar[str] = "hierarchical"
    key, without = "strategy.hierarchical", "false"
    exact = True

    def __init__(self, *, hosts: Sequence[int] | None = None) -> None:
        super().__init__(min_elements=0)
        self._hosts = hosts
        self._levels: Hierarchy | None = None

    def takes(self, shape: tuple[int, ...]) -> bool:
        return True  # Horovod puts what is small together.

    def prepare(self, slot: Slot, wire: Wire) -> None:
        """Collective. Find the hosts, before the first step."""
        self._find(wire)

    def _find(self, wire: Wire) -> Hierarchy:
        if self._levels is None:
            self._levels = Hierarchy(wire.world, hosts=self._hosts)
        return self._levels

    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        levels, name, traffic = self._find(wire), f"gradient.{slot.name}", wire.traffic
        if levels.flat:
            return (yield wire.allreduce(gradient, name=slot.name))
        traffic.count_allreduce(gradient.nbytes, ranks=levels.size_here)
        total = yield levels.up(gradient, name=name)
        if levels.leads:
            traffic.count_allreduce(gradient.nbytes, ranks=levels.hosts)
            total = yield levels.across(total, name=name)
            if levels.size_here > 1:
                traffic.count_allgather(gradient.nbytes, ranks=2)
        return (yield levels.down(total, name=name))

    def describe(self) -> dict[str, Any]:
        """The levels (JSON)."""
        levels = self._levels
        if levels is None or levels.flat:
            return {"levels": 1}
        return {"levels": 2, "hosts": levels.hosts, "ranks_a_host": levels.widest}
