"""One figure out of all ranks' footprints: each machine counted once, however many ranks ran on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from horovod_jobs.footprint.base import ADDED, NOT_METERED, PARTS, Footprint, join_methods


class HasGather(Protocol):
    """The part of a world of ranks that is needed here."""

    @property
    def local_rank(self) -> int:
        """Index of this rank on its host."""

    def gather_json(self, value: Any, *, name: str) -> list[Any]:
        """Everyone gets the list of values by rank; every rank must call."""


def across_hosts(local: Footprint | None, world: HasGather) -> Footprint:
    """Sums what the hosts used; every rank must call. Time is the longest rank's, never a sum.

    Only footprints of local rank 0 count, one per machine: containers that share a kernel read the same counters, so
    the first one stands for all. With ``details["scope"] == "job"`` a machine's CPU and RAM energy is multiplied by the
    job's share of the machine's busy CPU time (all ranks on it together), so that a neighbour's work is not charged to
    the job. GPUs are counted whole. A host that could not be metered makes the sum unknown.
    """
    entries = world.gather_json(
        {"local_rank": world.local_rank, "footprint": None if local is None else local.to_json()}, name="footprint"
    )
    footprints = [None if e["footprint"] is None else Footprint.from_json(e["footprint"]) for e in entries]
    seconds = max((f.seconds for f in footprints if f is not None), default=0.0)
    hosts: dict[str, Footprint] = {}
    for rank, (entry, footprint) in enumerate(zip(entries, footprints, strict=True)):
        if entry["local_rank"] == 0:
            footprint = footprint or Footprint(0.0, None, None, None, NOT_METERED)
            machine = footprint.details.get("machine", f"rank {rank}")
            hosts[machine] = _with_gpus_of(hosts[machine], footprint) if machine in hosts else footprint
    shared = [_attribute(host, machine=machine, ranks=footprints) for machine, host in hosts.items()]
    return _sum(shared, seconds=seconds)


def _with_gpus_of(host: Footprint, other: Footprint) -> Footprint:
    """``host`` plus the GPUs that another container on the same machine saw and ``host`` did not."""
    known, seen = host.details.get("gpus", []), other.details.get("gpus", [])
    kwh = other.details.get("gpu_kwh", 0.0)
    if host.energy_kwh is None or not seen or set(known) & set(seen):
        return host
    details = {**host.details, "gpus": [*known, *seen], "gpu_kwh": host.details.get("gpu_kwh", 0.0) + kwh}
    details["gpu_models"] = [*host.details.get("gpu_models", []), *other.details.get("gpu_models", [])]
    scale = kwh / other.energy_kwh if other.energy_kwh else 0.0
    co2_kg = None if host.co2_kg is None or other.co2_kg is None else host.co2_kg + other.co2_kg * scale
    cost_usd = None if host.cost_usd is None else host.cost_usd + kwh * (details.get("usd_per_kwh") or 0.0)
    return replace(host, energy_kwh=host.energy_kwh + kwh, co2_kg=co2_kg, cost_usd=cost_usd, details=details)


def _attribute(host: Footprint, *, machine: str, ranks: list[Footprint | None]) -> Footprint:
    """The job's part of a machine's footprint."""
    if host.details.get("scope") != "job" or host.energy_kwh is None:
        return host
    if any(f is None or "rank_cpu_s" not in f.details for f in ranks):
        method = host.method + "; whole machine, as not every rank told its CPU time"
        return replace(host, method=method)
    job_cpu_s = sum(f.details["rank_cpu_s"] for f in ranks if f is not None and f.details.get("machine") == machine)
    busy_cpu_s = host.details["machine_busy_cpu_s"]
    share = min(1.0, job_cpu_s / busy_cpu_s) if busy_cpu_s > 0 else 1.0
    parts = {name: host.details[name] * (1.0 if name == "gpu_kwh" else share) for name in PARTS}
    energy_kwh = sum(parts.values())
    saved_kwh = host.energy_kwh - energy_kwh
    details = {**host.details, **parts, "job_share": share, "machine_kwh": host.energy_kwh, "job_cpu_s": job_cpu_s}
    return Footprint(
        seconds=host.seconds,
        energy_kwh=energy_kwh,
        co2_kg=None
        if host.co2_kg is None
        else host.co2_kg * (energy_kwh / host.energy_kwh if host.energy_kwh else 1.0),
        cost_usd=None if host.cost_usd is None else host.cost_usd - saved_kwh * (details.get("usd_per_kwh") or 0.0),
        method=host.method + "; job's share of busy CPU time",
        details=details,
    )


def _sum(hosts: list[Footprint], *, seconds: float) -> Footprint:
    def total(name: str) -> float | None:
        values = [getattr(host, name) for host in hosts]
        return None if not values or any(value is None for value in values) else sum(values)

    return Footprint(
        seconds=seconds,
        energy_kwh=total("energy_kwh"),
        co2_kg=total("co2_kg"),
        cost_usd=total("cost_usd"),
        method=join_methods([host.method for host in hosts]) or NOT_METERED,
        details=_details(hosts),
    )


def _details(hosts: list[Footprint]) -> dict[str, Any]:
    """What every host says alike, the sums of what adds up, and the number of hosts."""
    private = {"machine", "rank_cpu_s", "job_share", *ADDED}
    details: dict[str, Any] = {"hosts": len(hosts)}
    first: Mapping[str, Any] = hosts[0].details if hosts else {}
    for key, value in first.items():
        if key not in private:
            values = [host.details.get(key) for host in hosts]
            details[key] = value if all(v == value for v in values) else values
    for key in ADDED:
        if hosts and all(key in host.details for host in hosts):
            details[key] = sum(host.details[key] for host in hosts)
    shares = [host.details["job_share"] for host in hosts if "job_share" in host.details]
    if shares:
        details["job_share"] = shares[0] if len(shares) == 1 else shares
    return details
