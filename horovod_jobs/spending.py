"""What a stage costs, read from this host's meter and added over hosts."""

from __future__ import annotations

from horovod_jobs.comm.world import World
from horovod_jobs.footprint import Footprint, Meter, across_hosts, for_rank


class Spending:
    """A stage's running bill. ``begin``, ``so_far`` and ``end`` follow each other on every rank."""

    def __init__(self, meter: Meter, world: World) -> None:
        self._meter = for_rank(meter, local_rank=world.local_rank)
        self._world = world
        self._total: Footprint | None = None

    def begin(self) -> None:
        """Collective: a meter that does not work on one host stops all."""
        self._total = None
        with self._world.agreed("meter.start"):
            self._meter.start()

    def so_far(self) -> Footprint:
        """Collective. The cost since ``begin``, over all hosts."""
        total = self.end()
        self._meter.start()
        return total

    def end(self) -> Footprint:
        """Collective. The whole cost; the meter rests."""
        self._total = (self._total or Footprint.zero()) + across_hosts(self._meter.stop(), self._world)
        return self._total

    def abandon(self) -> Footprint | None:
        """Let the meter rest without asking the others; gives what ``so_far`` gave last, or None where it was not called."""
        self._meter.stop()
        return self._total
