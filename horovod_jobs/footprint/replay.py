"""A meter that replays a recorded power trace: energy code is tested, and a job rehearsed, without any hardware."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

from horovod_jobs.errors import ConfigError
from horovod_jobs.footprint.base import Footprint, Tariff, require_started, require_stopped


class ReplayMeter:
    """Replays ``trace``, pairs of (seconds since the first ``start``, watts of this host), against a clock.

    A power holds from its own second until the next pair's; the last one holds for ever.

    Raises:
        ConfigError: the trace is empty, does not begin at 0, is not in order, or has a negative power.
    """

    def __init__(
        self,
        *,
        trace: Sequence[Sequence[float]],
        carbon_intensity_g_per_kwh: float | None = None,
        usd_per_kwh: float | None = None,
        usd_per_host_hour: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trace = _checked(trace)
        self._tariff = Tariff(carbon_intensity_g_per_kwh, usd_per_kwh, usd_per_host_hour)
        self._clock = clock
        self._origin: float | None = None
        self._started: float | None = None

    def start(self) -> None:
        """Begin; the trace's second 0 is the first call."""
        require_stopped(self._started)
        self._started = self._clock()
        if self._origin is None:
            self._origin = self._started

    def stop(self) -> Footprint:
        """The integral of the replayed power since ``start``."""
        started, origin, now = require_started(self._started), require_started(self._origin), self._clock()
        self._started = None
        energy_kwh = self._joules(started - origin, now - origin) / 3.6e6
        seconds = now - started
        return Footprint(
            seconds=seconds,
            energy_kwh=energy_kwh,
            co2_kg=self._tariff.co2_kg(energy_kwh),
            cost_usd=self._tariff.cost_usd(energy_kwh, seconds=seconds),
            method="replayed: recorded power trace",
            details=self._tariff.to_json(),
        )

    def _joules(self, begin_s: float, end_s: float) -> float:
        edges = [*(second for second, _ in self._trace), math.inf]
        return sum(
            watts * max(0.0, min(end_s, edges[i + 1]) - max(begin_s, edges[i]))
            for i, (_, watts) in enumerate(self._trace)
        )


def _checked(trace: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    pairs = []
    for entry in trace:
        if len(entry) != 2:
            raise ConfigError(f"footprint.trace: {list(entry)} is not a pair; write [seconds, watts]")
        pairs.append((float(entry[0]), float(entry[1])))
    if not pairs or pairs[0][0] != 0:
        raise ConfigError(f"footprint.trace={pairs}: it must begin at second 0; put [0, watts] first")
    if any(b[0] <= a[0] for a, b in itertools.pairwise(pairs)):
        raise ConfigError(f"footprint.trace={pairs}: the seconds must increase; sort the pairs")
    if any(not 0 <= watts < math.inf for _, watts in pairs):
        raise ConfigError(f"footprint.trace={pairs}: a power is negative or not finite; powers are watts >= 0")
    return pairs
