"""Adasum: gradients are added as far as they are orthogonal and averaged as far as they are parallel.

Maleki et al. 2021, arXiv:2006.02924: ``Adasum(a, b) = (1 - a'b / 2|a|^2) a + (1 - a'b / 2|b|^2) b``, by pairs, then pairs of pairs,
for each tensor by itself. Horovod does it over MPI for a power of two of ranks.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from horovod_jobs.comm.world import World
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import Method, Rounds, Slot, Wire


def check_world(world: World) -> None:
    """Refuse a world in which Horovod has no Adasum.

    Raises:
        ConfigError: several ranks under Gloo, or not a power of two of them.
    """
    if world.size > 1 and world.controller != "mpi":
        raise ConfigError(
            f"strategy.op=adasum needs MPI and these ranks were started under {world.controller}; start them by MPI "
            "(launch.controller=mpi), or use strategy.op=sum"
        )
    if world.size & (world.size - 1):
        below = 1 << (world.size.bit_length() - 1)
        raise ConfigError(
            f"strategy.op=adasum needs a power of two of ranks and there are {world.size}; start {below} or {2 * below}, or use "
            "strategy.op=sum"
        )


class Adasum(Method):
    """Adasum of the ranks' gradients, in full precision.

    The loop gives each rank's gradient divided by the *global* batch, ``g_r |B_r| / |B|`` with ``g_r`` the mean over the rank's
    own samples. What Adasum gets is that times the number of ranks: ``g_r`` itself where shares are even, and otherwise ``g_r``
    weighted by its share, so that parallel gradients come out as the mean over all samples whatever the shares. Adasum of scaled
    gradients is scaled alike, so this product decides the size of the update and nothing else.
    """

    name: ClassVar[str] = "adasum"
    key, without = "strategy.op", "sum"

    def __init__(self) -> None:
        super().__init__(min_elements=0)

    def takes(self, shape: tuple[int, ...]) -> bool:
        return True  # It is defined tensor by tensor: putting the small ones together would change it.

    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        return (yield wire.allreduce(gradient * wire.world.size, name=slot.name, op="adasum"))
