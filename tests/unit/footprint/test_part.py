"""Stages side by side on one host share its footprint: together they are charged what the host used, once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from horovod_jobs.footprint import Footprint, NullMeter, ReplayMeter
from horovod_jobs.footprint.part import PartMeter, for_part, part_of_host
from tests.unit.footprint.test_footprint import Clock, gathered, host, rank

RENT_USD = 3600 / 10  # an hour's rent that comes to one dollar for ten seconds


def whole(scope: str) -> Footprint:
    """Energy for 0.25 dollars and a rent of one."""
    found = host(1.0, scope=scope, usd_per_host_hour=RENT_USD)
    return replace(found, cost_usd=1.25)


def test_parts_of_a_machine_add_up_to_it():
    parts = [part_of_host(whole("machine"), ranks=ranks, of=4) for ranks in (1, 3)]
    assert [part.energy_kwh for part in parts] == pytest.approx([0.25, 0.75])
    assert sum(part.co2_kg for part in parts) == pytest.approx(0.4)
    assert sum(part.cost_usd for part in parts) == pytest.approx(1.25)
    for name in ("cpu_kwh", "ram_kwh", "gpu_kwh"):
        assert sum(part.details[name] for part in parts) == pytest.approx(whole("machine").details[name])
    assert parts[0].method == "measured: CPU by RAPL; 1 of the host's 4 ranks"
    assert [part.seconds for part in parts] == [10.0, 10.0], "time is not divided"


def test_with_scope_job_the_cpu_time_divides_cpu_and_ram_and_the_ranks_divide_gpus_and_rent():
    """Four ranks on a host, each 2 of its 16 busy CPU seconds: a stage of one rank and a stage of three."""
    reading = replace(whole("job"), details={**whole("job").details, "rank_cpu_s": 2.0})
    one, three = (
        gathered(
            [part_of_host(reading, ranks=ranks, of=4), *[rank(2.0) for _ in range(ranks - 1)]],
            local_ranks=list(range(ranks)),
        )
        for ranks in (1, 3)
    )
    assert one.details["cpu_kwh"] == pytest.approx(0.6 * 2 / 16)
    assert three.details["cpu_kwh"] == pytest.approx(0.6 * 6 / 16)
    assert one.details["gpu_kwh"] + three.details["gpu_kwh"] == pytest.approx(0.3)
    both = gathered([reading, *[rank(2.0) for _ in range(3)]], local_ranks=[0, 1, 2, 3])
    assert one.energy_kwh + three.energy_kwh == pytest.approx(both.energy_kwh)
    assert one.cost_usd + three.cost_usd == pytest.approx(both.cost_usd)
    assert one.co2_kg + three.co2_kg == pytest.approx(both.co2_kg)


def test_a_meter_for_a_part_reads_the_host_and_takes_its_part():
    clock = Clock()
    meter = PartMeter(
        ReplayMeter(trace=[[0, 3600.0]], usd_per_kwh=0.5, usd_per_host_hour=1.0, clock=clock), ranks=1, of=2
    )
    meter.start()
    clock.now += 1000.0
    found = meter.stop()
    assert found.seconds == 1000.0
    assert found.energy_kwh == pytest.approx(0.5)
    assert found.cost_usd == pytest.approx(0.25 + 1000 / 3600 / 2)
    assert found.method == "replayed: recorded power trace; 1 of the host's 2 ranks"


def test_who_has_the_host_to_itself_or_no_meter_keeps_what_there_is():
    replay, null = ReplayMeter(trace=[[0, 1.0]]), NullMeter()
    assert for_part(replay, ranks=2, of=2) is replay
    assert for_part(null, ranks=1, of=2) is null
    assert isinstance(for_part(replay, ranks=1, of=2), PartMeter)


def test_unknown_stays_unknown():
    unknown = Footprint(10.0, None, None, None, "not metered", {})
    assert part_of_host(unknown, ranks=1, of=2) == unknown
