"""CodeCarbon's offline tracker as a meter: no network, no files, no log lines, one machine-wide reading per host.

What CodeCarbon 3.3 offers, and what is made of it here:

* ``tracking_mode="machine"`` is used. ``"process"`` would follow local rank 0 and its children only, miss the other
  ranks, and charge at least 10 W of RAM to each process that runs it.
* CPU: RAPL (or Windows EMI, Apple's and Raspberry's sensors) where it is readable, said as ``measured``; otherwise the
  machine's CPU load times the TDP, said as ``estimated``. RAM is always an estimate from the installed memory. NVIDIA
  and AMD GPUs are read by NVML and AMD SMI. Published comparisons find errors up to 40 % (arXiv:2509.22092).
* On a shared node the whole machine's power overstates a job. ``scope="job"`` therefore takes the job's share of the
  machine's busy CPU time (``across_hosts``); ``scope="machine"`` charges everything, as for a reserved node.
* Stages are read by ``start_task``/``stop_task``, which take a reading at both ends, so a stage shorter than the
  sampling interval is counted in full. Its sampling thread wakes every ``sample_s`` seconds instead of every second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.footprint.base import Footprint, Tariff, machine_id, process_cpu_s, require_started, require_stopped

_MEASURED_CPU = {"intel_rapl": "RAPL", "windows_emi": "EMI", "intel_power_gadget": "Intel Power Gadget"}
_WATTS_PER_UNKNOWN_THREAD = 4  # What CodeCarbon takes for a CPU that is not in its list.


class CodeCarbonMeter:
    """Meters this host by CodeCarbon. Cheap to construct (the hardware is opened at the first ``start``), reusable.

    Args:
        country_iso_code: three letters (ISO 3166-1 alpha-3), for the carbon intensity of the grid.
        region: state or province (USA, CAN, CHN) or bidding zone (SWE, NOR, FIN); None for the country's mean.
        carbon_intensity_g_per_kwh: overrides the intensity of the country.
        usd_per_kwh: price of energy; None leaves the cost unknown.
        usd_per_host_hour: rent of one host, added to the price of the energy.
        pue: energy of the data centre over the energy of its computers; multiplies the energy.
        cpu_tdp_w: power of all the machine's CPUs under full load. Given, it is used in place of RAPL.
        ram_w: power of all the machine's memory, in place of the estimate.
        gpu_ids: GPUs to count (indexes or UUIDs); None for the visible ones.
        scope: "job" or "machine", see the module's text.
        sample_s: seconds between samples of the load within a stage, at least 10.

    Raises:
        ConfigError: a value that cannot be used; the country or region is not in CodeCarbon's tables (at ``check`` or ``start``).
        SetupError: CodeCarbon is not installed (at ``check``) or finds no hardware (at ``start``).
    """

    def __init__(
        self,
        *,
        country_iso_code: str,
        region: str | None = None,
        carbon_intensity_g_per_kwh: float | None = None,
        usd_per_kwh: float | None = None,
        usd_per_host_hour: float = 0.0,
        pue: float = 1.0,
        cpu_tdp_w: float | None = None,
        ram_w: float | None = None,
        gpu_ids: Sequence[int | str] | None = None,
        scope: str = "job",
        sample_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if scope not in ("job", "machine"):
            raise ConfigError(f"footprint.scope={scope!r} is not known; use 'job' or 'machine'")
        if sample_s < 10:
            raise ConfigError(f"footprint.sample_s={sample_s} is below 10; a shorter interval would disturb the ranks")
        for name, value in (("cpu_tdp_w", cpu_tdp_w), ("ram_w", ram_w)):
            if value is not None and not 0 <= value < 1e6:
                raise ConfigError(f"footprint.{name}={value} is not a power in watts; use a number >= 0, or null")
        self._tariff = Tariff(
            carbon_intensity_g_per_kwh, usd_per_kwh, usd_per_host_hour, country_iso_code.upper(), region, pue
        )
        self._options = {"force_cpu_power": cpu_tdp_w, "force_ram_power": ram_w}
        self._gpu_ids = None if gpu_ids is None else list(gpu_ids)
        self._scope = scope
        self._sample_s = sample_s
        self._clock = clock
        self._tracker: Any = None
        self._started: tuple[float, float, float] | None = None

    def check(self) -> None:
        """Look the country and the region up, before there is anything to meter.

        Raises:
            ConfigError: CodeCarbon's tables do not have them.
            SetupError: CodeCarbon is not installed.
        """
        self._tariff = _with_intensity(self._tariff)

    def start(self) -> None:
        """Begin. The first call opens the hardware (1 to 2 s); the later ones take under a millisecond."""
        require_stopped(self._started)
        if self._tracker is None:
            self.check()
            self._tracker = self._open()
        self._tracker.start_task()
        self._started = (self._clock(), process_cpu_s(), _machine_busy_s())

    def stop(self) -> Footprint:
        """The whole machine's energy since ``start``; ``across_hosts`` takes the job's share of it if so configured."""
        started, rank_cpu_s, busy_cpu_s = require_started(self._started)
        self._started = None
        seconds = self._clock() - started
        data = self._tracker.stop_task()
        parts = {"cpu_kwh": data.cpu_energy, "ram_kwh": data.ram_energy, "gpu_kwh": data.gpu_energy}
        energy_kwh = sum(parts.values())
        hardware = describe_hardware(self._tracker)
        return Footprint(
            seconds=seconds,
            energy_kwh=energy_kwh,
            co2_kg=self._tariff.co2_kg(energy_kwh),
            cost_usd=self._tariff.cost_usd(energy_kwh, seconds=seconds),
            method=hardware.pop("method"),
            details={
                **self._tariff.to_json(),
                **hardware,
                **parts,
                "scope": self._scope,
                "machine": machine_id(),
                "rank_cpu_s": max(0.0, process_cpu_s() - rank_cpu_s),
                "machine_busy_cpu_s": max(0.0, _machine_busy_s() - busy_cpu_s),
            },
        )

    def _open(self) -> Any:
        tracker_class = _codecarbon().OfflineEmissionsTracker
        tracker = tracker_class(
            country_iso_code=self._tariff.country,
            # With the intensity given, the tracker asks no web service, whatever its own config files say.
            force_carbon_intensity_g_co2e_kwh=self._tariff.carbon_intensity_g_per_kwh,
            pue=self._tariff.pue,
            tracking_mode="machine",
            measure_power_secs=self._sample_s,
            output_methods=[],
            emissions_endpoint=None,
            allow_multiple_runs=True,
            gpu_ids=self._gpu_ids,
            log_level="critical",
            **self._options,
        )
        try:
            tracker.get_detected_hardware()
            # Its load sampler is fixed to 1 s, which is more often than a mean over a stage needs.
            tracker._scheduler_monitor_power.interval = self._sample_s
        except AttributeError as error:  # Its constructor swallows exceptions and leaves half a tracker.
            raise SetupError(
                f"footprint: CodeCarbon {_codecarbon().__version__} could not open this machine's hardware ({error}); "
                "use footprint=none, or a version >= 3.3, < 4"
            ) from error
        return tracker


def describe_hardware(tracker: Any) -> dict[str, Any]:
    """What the tracker reads: ``method`` ("measured: ...; estimated: ..."), the CPU's and GPUs' models, the TDP."""
    measured, estimated = [], []
    found: dict[str, Any] = {}
    for part in sorted(tracker._hardware, key=lambda part: type(part).__name__):
        kind = type(part).__name__
        if kind == "CPU":
            found["cpu_model"] = part.get_model()
            if part._mode in _MEASURED_CPU:
                measured.append(f"CPU by {_MEASURED_CPU[part._mode]}")
                continue
            load = "load x " if part._mode == "cpu_load" else "half of "
            estimated.append(f"CPU by {load}{_tdp(part, forced=tracker._force_cpu_power)}")
            found["cpu_tdp_w"] = part._tdp
        elif kind == "RAM":
            given = tracker._force_ram_power is not None
            estimated.append(f"RAM by {'given power' if given else 'installed memory'}")
            found["ram_w"] = part.total_power().W
        elif kind == "GPU":
            measured.append("GPU by NVML" if _is_nvidia(part) else "GPU by AMD SMI")
            wanted = set(part.gpu_ids or [])
            infos = [info for info in part.devices.get_gpu_static_info() if info.get("gpu_index") in wanted]
            found["gpus"] = [str(info.get("uuid")) for info in infos]
            found["gpu_models"] = [str(info.get("name")) for info in infos]
        else:  # AppleSiliconChip and Raspberry read sensors.
            measured.append(f"{part.chip_part} by {kind}")
    phrases = [
        f"{word}: {', '.join(parts)}" for word, parts in (("measured", measured), ("estimated", estimated)) if parts
    ]
    return {"method": "; ".join(phrases) + " (CodeCarbon)", **found}


def _tdp(part: Any, *, forced: float | None) -> str:
    if forced is not None:
        return f"given TDP of {part._tdp:g} W"
    import psutil

    guess = _WATTS_PER_UNKNOWN_THREAD * (psutil.cpu_count() or 1)
    note = ", guessed from the number of threads" if part._is_generic_tdp or part._tdp == guess else ""
    return f"TDP of {part._tdp:g} W{note}"


def _is_nvidia(part: Any) -> bool:
    return all("nvidia" in type(device).__name__.lower() for device in part.devices.devices)


def _codecarbon() -> Any:
    # Its import logs and its tracker logs at INFO before any level can be given to it.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    try:
        import codecarbon
    except ImportError as error:
        raise SetupError(
            f"footprint: CodeCarbon is not installed ({error}); pip install 'codecarbon>=3.3,<4', or use footprint=none"
        ) from error
    return codecarbon


def _with_intensity(tariff: Tariff) -> Tariff:
    """The tariff with the grid's carbon intensity from CodeCarbon's tables, unless it is given."""
    if tariff.carbon_intensity_g_per_kwh is not None:
        return tariff
    _codecarbon()
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    tables = DataSource()
    countries = tables.get_global_energy_mix_data()
    if tariff.country not in countries:
        raise ConfigError(
            f"footprint.country_iso_code={tariff.country!r} is not among the {len(countries)} countries of CodeCarbon; "
            "use three letters such as DEU, or give footprint.carbon_intensity_g_per_kwh"
        )
    emissions, one_kwh = Emissions(tables), Energy.from_energy(1.0)
    place = GeoMetadata(country_iso_code=tariff.country, region=tariff.region and tariff.region.lower())
    try:
        # Asked for the region itself: the tracker's own way falls back to the country without an error.
        kg = country_kg = emissions.get_country_emissions(one_kwh, place)
        if tariff.region:
            kg = emissions.get_region_emissions(one_kwh, place)
            if (
                kg == country_kg
            ):  # Some countries' look-ups answer with the country's mean for a region they do not know.
                raise LookupError("only the country's mean is known")
    except Exception as error:
        raise ConfigError(
            f"footprint.region={tariff.region!r} of {tariff.country} is not in CodeCarbon's tables ({error}); "
            "leave it null for the country's mean, or give footprint.carbon_intensity_g_per_kwh"
        ) from error
    return Tariff(kg * 1000, tariff.usd_per_kwh, tariff.usd_per_host_hour, tariff.country, tariff.region, tariff.pue)


def _machine_busy_s() -> float:
    """CPU seconds that all CPUs of the machine were busy since its start, whoever used them."""
    import psutil

    times = psutil.cpu_times()._asdict()
    not_busy = ("idle", "iowait", "steal", "guest", "guest_nice")  # Guests' time is contained in user and nice.
    return float(sum(value for name, value in times.items() if name not in not_busy))
