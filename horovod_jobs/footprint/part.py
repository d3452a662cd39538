"""A host's footprint where several stages run on it at the same time: each stage takes its part, so that nothing counts twice."""

from __future__ import annotations

from dataclasses import replace

from horovod_jobs.footprint.base import PARTS, Footprint, Meter, NullMeter


class PartMeter:
    """Meters a host for a stage that has ``ranks`` of the host's ``of`` ranks; the others belong to stages beside it."""

    def __init__(self, meter: Meter, *, ranks: int, of: int) -> None:
        self._meter, self._ranks, self._of = meter, ranks, of

    def start(self) -> None:
        """Begin."""
        self._meter.start()

    def stop(self) -> Footprint:
        """The stage's part of what the host used since ``start``."""
        return part_of_host(self._meter.stop(), ranks=self._ranks, of=self._of)


def for_part(meter: Meter, *, ranks: int, of: int) -> Meter:
    """The meter of a stage with ``ranks`` of a host's ``of`` ranks; a null meter stays itself."""
    return meter if isinstance(meter, NullMeter) or ranks == of else PartMeter(meter, ranks=ranks, of=of)


def part_of_host(host: Footprint, *, ranks: int, of: int) -> Footprint:
    """What a stage with ``ranks`` of a host's ``of`` ranks is charged.

    Energy, carbon, cost and rent are divided by the number of ranks. With ``scope="job"`` CPU and RAM are left whole here:
    ``across_hosts`` charges them by the CPU time of the stage's own ranks, which divides them already.
    """
    part = ranks / of
    by_cpu_time = host.details.get("scope") == "job" and "rank_cpu_s" in host.details
    divided = [name for name in PARTS if name in host.details and not (by_cpu_time and name != "gpu_kwh")]
    details = {**host.details, **{name: host.details[name] * part for name in divided}}
    energy_kwh = host.energy_kwh
    if energy_kwh is not None:
        energy_kwh = sum(details[name] for name in PARTS) if by_cpu_time else energy_kwh * part
    less = energy_kwh / host.energy_kwh if host.energy_kwh and energy_kwh is not None else part
    rent_usd = host.seconds / 3600 * (host.details.get("usd_per_host_hour") or 0.0)
    return replace(
        host,
        energy_kwh=energy_kwh,
        co2_kg=None if host.co2_kg is None else host.co2_kg * less,
        cost_usd=None if host.cost_usd is None else (host.cost_usd - rent_usd) * less + rent_usd * part,
        method=host.method if energy_kwh is None else f"{host.method}; {ranks} of the host's {of} ranks",
        details=details,
    )
