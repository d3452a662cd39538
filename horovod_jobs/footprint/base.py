"""The footprint of a piece of work, the protocol of a meter, and the two meters that read no power."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from horovod_jobs.errors import ConfigError

NOT_METERED = "not metered"
PARTS = ("cpu_kwh", "ram_kwh", "gpu_kwh")
ADDED = (*PARTS, "machine_kwh", "job_cpu_s", "machine_busy_cpu_s")  # the details that add up over time and over hosts
_T = TypeVar("_T")


@dataclass(frozen=True)
class Footprint:
    """Time, energy, carbon and money of a piece of work. ``None`` means unknown, which is not the same as zero.

    ``method`` says how the energy was found, e.g. ``"estimated: CPU load x TDP (CodeCarbon)"``. ``details`` holds what
    the figures rest on: carbon intensity (g/kWh), country, PUE, prices, the parts (CPU, RAM, GPU) and the job's share.
    """

    seconds: float
    energy_kwh: float | None
    co2_kg: float | None
    cost_usd: float | None
    method: str
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def zero(cls) -> Footprint:
        """Nothing was done: the neutral element of ``+``."""
        return cls(seconds=0.0, energy_kwh=0.0, co2_kg=0.0, cost_usd=0.0, method="")

    def __add__(self, other: Footprint) -> Footprint:
        """One after the other on the same hosts. Unknown plus known is unknown: a part does not pass for the whole."""
        return Footprint(
            seconds=self.seconds + other.seconds,
            energy_kwh=_plus(self.energy_kwh, other.energy_kwh),
            co2_kg=_plus(self.co2_kg, other.co2_kg),
            cost_usd=_plus(self.cost_usd, other.cost_usd),
            method=join_methods([self.method, other.method]),
            details=_joined_details(self.details, other.details),
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for ``artifact.json``."""
        return {
            "seconds": self.seconds,
            "energy_kwh": self.energy_kwh,
            "co2_kg": self.co2_kg,
            "cost_usd": self.cost_usd,
            "method": self.method,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Footprint:
        """The reverse of ``to_json``.

        Raises:
            ConfigError: a figure is missing, not a number, or negative.
        """

        def number(key: str, *, optional: bool = True) -> float | None:
            raw = value.get(key)
            if raw is None and optional:
                return None
            if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw) or raw < 0:
                raise ConfigError(
                    f"footprint: {key}={raw!r} is not a number >= 0; the record is damaged, make it again"
                )
            return float(raw)

        seconds = number("seconds", optional=False)
        assert seconds is not None
        return cls(
            seconds=seconds,
            energy_kwh=number("energy_kwh"),
            co2_kg=number("co2_kg"),
            cost_usd=number("cost_usd"),
            method=str(value.get("method", NOT_METERED)),
            details=dict(value.get("details") or {}),
        )


class Meter(Protocol):
    """Meters the host it runs on. ``start`` and ``stop`` are cheap and may be called again for the next stage."""

    def start(self) -> None:
        """Begin; raises ``ConfigError`` when the meter already runs."""

    def stop(self) -> Footprint:
        """What was used since ``start``, by this host (or, for a rank that does not meter its host, by this rank)."""


@dataclass(frozen=True)
class Tariff:
    """What a kilowatt-hour and an hour of a host cost, in carbon and money."""

    carbon_intensity_g_per_kwh: float | None = None
    usd_per_kwh: float | None = None
    usd_per_host_hour: float = 0.0
    country: str | None = None
    region: str | None = None
    pue: float = 1.0

    def __post_init__(self) -> None:
        for name in ("carbon_intensity_g_per_kwh", "usd_per_kwh", "usd_per_host_hour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(
                    f"footprint.{name}={value} must be a number >= 0; give the price or intensity, or null"
                )
        if not 1.0 <= self.pue < math.inf:
            raise ConfigError(
                f"footprint.pue={self.pue} must be >= 1 (data centre's energy over its computers'); use 1.0 if unknown"
            )

    def co2_kg(self, energy_kwh: float | None) -> float | None:
        """Carbon of ``energy_kwh``; unknown without an intensity."""
        if energy_kwh is None or self.carbon_intensity_g_per_kwh is None:
            return None
        return energy_kwh * self.carbon_intensity_g_per_kwh / 1000

    def cost_usd(self, energy_kwh: float | None, *, seconds: float) -> float | None:
        """Price of ``energy_kwh`` plus the rent of one host; unknown when the energy or its price is."""
        if energy_kwh is None or self.usd_per_kwh is None:
            return None
        return energy_kwh * self.usd_per_kwh + seconds / 3600 * self.usd_per_host_hour

    def to_json(self) -> dict[str, Any]:
        """The fields of ``Footprint.details`` that come from the tariff."""
        return {
            "carbon_intensity_g_per_kwh": self.carbon_intensity_g_per_kwh,
            "country": self.country,
            "region": self.region,
            "pue": self.pue,
            "usd_per_kwh": self.usd_per_kwh,
            "usd_per_host_hour": self.usd_per_host_hour,
        }


class NullMeter:
    """Reads nothing: only the time is known."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None

    def start(self) -> None:
        """Begin."""
        require_stopped(self._started)
        self._started = self._clock()

    def stop(self) -> Footprint:
        """The time since ``start``; everything else is ``None``."""
        seconds = self._clock() - require_started(self._started)
        self._started = None
        return Footprint(seconds=seconds, energy_kwh=None, co2_kg=None, cost_usd=None, method=NOT_METERED)


class RankMeter:
    """Reads only the CPU time of its own rank, so that the host's energy can be shared out between jobs."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Begin."""
        require_stopped(self._started)
        self._started = (self._clock(), process_cpu_s())

    def stop(self) -> Footprint:
        """Time, and in ``details`` this rank's CPU seconds and machine; the energy is the business of local rank 0."""
        started, cpu_s = require_started(self._started)
        self._started = None
        details = {"rank_cpu_s": max(0.0, process_cpu_s() - cpu_s), "machine": machine_id()}
        return Footprint(self._clock() - started, None, None, None, NOT_METERED, details)


def for_rank(meter: Meter, *, local_rank: int) -> Meter:
    """The meter a rank runs: the configured one on local rank 0, a ``RankMeter`` beside it; ``NullMeter`` stays itself.

    ``meter`` may be constructed on every rank: constructing one is cheap, only ``start`` opens the hardware.
    """
    if local_rank == 0 or isinstance(meter, NullMeter):
        return meter
    return RankMeter()


def process_cpu_s() -> float:
    """CPU seconds (user + system) of this process and of its children, the living and the reaped."""
    import psutil

    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:  # It ended between the listing and the reading; its time is then in os.times().
            continue
        total += times.user + times.system
    return total


@functools.cache
def machine_id() -> str:
    """A short identity of the physical machine or virtual machine: containers on one kernel share it."""
    try:
        raw = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # Not Linux: the host's name is the best there is.
        raw = platform.node()
    return hashlib.sha256(raw.encode()).hexdigest()[:12]


def join_methods(methods: list[str]) -> str:
    """One phrase for several methods, each named once, in order."""
    unique = list(dict.fromkeys(part for method in methods if method for part in method.split("; ")))
    return "; ".join(unique)


def require_stopped(started: object) -> None:
    """Raises ``ConfigError`` if the meter already runs."""
    if started is not None:
        raise ConfigError("footprint: the meter already runs; call stop() before start()")


def require_started(started: _T | None) -> _T:
    """The start mark; raises ``ConfigError`` if there is none."""
    if started is None:
        raise ConfigError("footprint: the meter does not run; call start() before stop()")
    return started


def _joined_details(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    if not a or not b:
        return {**a, **b}
    joined = {**a, **b}
    for key in ADDED:
        if key in a and key in b:
            joined[key] = a[key] + b[key]
        else:  # One part of the work did not tell it, so the sum is not known.
            joined.pop(key, None)
    if isinstance(joined.get("job_share"), float) and joined.get("machine_busy_cpu_s"):
        joined["job_share"] = min(1.0, joined.get("job_cpu_s", 0.0) / joined["machine_busy_cpu_s"])
    return joined


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
