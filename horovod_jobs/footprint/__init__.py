"""What a stage costs: energy, carbon and money, measured where the hardware can say and estimated where it cannot.

A meter is named in the config by ``_target_``. Every rank starts and stops its own (``for_rank`` decides which kind),
and ``across_hosts`` makes one figure of them: once per machine, never once per rank.
"""

from __future__ import annotations

from horovod_jobs.footprint.base import Footprint, Meter, NullMeter, RankMeter, Tariff, for_rank
from horovod_jobs.footprint.codecarbon_meter import CodeCarbonMeter
from horovod_jobs.footprint.hosts import across_hosts
from horovod_jobs.footprint.replay import ReplayMeter

__all__ = [
    "CodeCarbonMeter",
    "Footprint",
    "Meter",
    "NullMeter",
    "RankMeter",
    "ReplayMeter",
    "Tariff",
    "across_hosts",
    "for_rank",
]
