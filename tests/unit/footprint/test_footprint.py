"""Footprints add up honestly, tariffs are checked, and every machine counts once."""

from __future__ import annotations

import math
import time

import pytest

from horovod_jobs.errors import ConfigError
from horovod_jobs.footprint import Footprint, NullMeter, RankMeter, ReplayMeter, Tariff, across_hosts, for_rank


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeWorld:
    """One rank's view of a world whose other ranks have told their values already."""

    def __init__(self, told, *, rank):
        self._told, self.local_rank, self._rank = told, told[rank]["local_rank"], rank
        self.mine = None

    def gather_json(self, value, *, name):
        assert name
        self.mine = value
        return [value if rank == self._rank else told for rank, told in enumerate(self._told)]


def gathered(footprints, *, local_ranks):
    """What ``across_hosts`` gives on every rank of a world with these footprints; asserts that all ranks agree."""
    told = [
        {"local_rank": local, "footprint": None if f is None else f.to_json()}
        for f, local in zip(footprints, local_ranks, strict=True)
    ]
    results = [across_hosts(f, FakeWorld(told, rank=rank)) for rank, f in enumerate(footprints)]
    assert all(result == results[0] for result in results)
    return results[0]


def host(kwh=1.0, *, seconds=10.0, machine="m0", scope="machine", method="measured: CPU by RAPL", **details):
    parts = {"cpu_kwh": 0.6 * kwh, "ram_kwh": 0.1 * kwh, "gpu_kwh": 0.3 * kwh}
    details = {"machine": machine, "scope": scope, "rank_cpu_s": 4.0, "machine_busy_cpu_s": 16.0, **parts, **details}
    return Footprint(seconds, kwh, 0.4 * kwh, 0.25 * kwh, method, {"usd_per_kwh": 0.25, "country": "DEU", **details})


def rank(cpu_s=4.0, *, seconds=10.0, machine="m0"):
    return Footprint(seconds, None, None, None, "not metered", {"rank_cpu_s": cpu_s, "machine": machine})


def test_four_ranks_on_two_hosts_count_two_hosts():
    result = gathered(
        [host(1.0), rank(seconds=12.0), host(3.0, machine="m1"), rank(machine="m1")], local_ranks=[0, 1, 0, 1]
    )
    assert result.energy_kwh == pytest.approx(4.0)
    assert result.co2_kg == pytest.approx(1.6)
    assert result.cost_usd == pytest.approx(1.0)
    assert result.seconds == 12.0
    assert result.method == "measured: CPU by RAPL"
    assert result.details["hosts"] == 2
    assert result.details["country"] == "DEU"
    assert result.details["cpu_kwh"] == pytest.approx(2.4)


def test_other_ranks_may_have_nothing_to_tell():
    result = gathered([host(1.0), None, host(3.0, machine="m1"), None], local_ranks=[0, 1, 0, 1])
    assert result.energy_kwh == pytest.approx(4.0)


def test_two_containers_on_one_machine_count_once():
    assert gathered([host(1.0), host(1.0)], local_ranks=[0, 0]).energy_kwh == pytest.approx(1.0)


def test_gpus_that_only_the_second_container_sees_are_added():
    result = gathered([host(1.0, gpus=["a"]), host(1.0, gpus=["b"])], local_ranks=[0, 0])
    assert result.energy_kwh == pytest.approx(1.3)
    assert result.co2_kg == pytest.approx(0.52)
    assert result.cost_usd == pytest.approx(0.25 * 1.3)
    assert result.details["gpus"] == ["a", "b"]
    same = gathered([host(1.0, gpus=["a"]), host(1.0, gpus=["a"])], local_ranks=[0, 0])
    assert same.energy_kwh == pytest.approx(1.0)


def test_job_scope_takes_the_share_of_all_its_ranks():
    # 4 + 4 of 16 busy CPU seconds: half of CPU and RAM, all of the GPU.
    result = gathered([host(1.0, scope="job"), rank(4.0)], local_ranks=[0, 1])
    assert result.details["job_share"] == pytest.approx(0.5)
    assert result.energy_kwh == pytest.approx(0.3 + 0.05 + 0.3)
    assert result.co2_kg == pytest.approx(0.4 * 0.65)
    assert result.cost_usd == pytest.approx(0.25 * 0.65)
    assert result.details["machine_kwh"] == pytest.approx(1.0)
    assert "job's share of busy CPU time" in result.method


def test_job_scope_never_exceeds_the_machine():
    assert gathered([host(1.0, scope="job"), rank(40.0)], local_ranks=[0, 1]).energy_kwh == pytest.approx(1.0)


def test_job_scope_counts_only_the_ranks_of_its_machine():
    footprints = [host(1.0, scope="job"), host(1.0, scope="job", machine="m1"), rank(8.0, machine="m1")]
    result = gathered(footprints, local_ranks=[0, 0, 1])
    assert result.details["job_share"] == [pytest.approx(0.25), pytest.approx(0.75)]


def test_job_scope_without_every_rank_charges_the_machine_and_says_so():
    result = gathered([host(1.0, scope="job"), None], local_ranks=[0, 1])
    assert result.energy_kwh == pytest.approx(1.0)
    assert "whole machine" in result.method


def test_one_host_that_is_not_metered_makes_the_sum_unknown():
    result = gathered([host(1.0), NullMeterFootprint], local_ranks=[0, 0])
    assert (result.energy_kwh, result.co2_kg, result.cost_usd) == (None, None, None)
    assert "not metered" in result.method
    assert gathered([None, None], local_ranks=[0, 1]).energy_kwh is None


NullMeterFootprint = Footprint(10.0, None, None, None, "not metered", {"machine": "m1"})


def test_addition():
    total = host(1.0) + host(2.0, method="estimated: CPU")
    assert (total.seconds, total.energy_kwh) == (20.0, pytest.approx(3.0))
    assert total.method == "measured: CPU by RAPL; estimated: CPU"
    assert total.details["cpu_kwh"] == pytest.approx(1.8)
    assert (host(1.0) + host(1.0)).method == "measured: CPU by RAPL"
    assert (host(1.0) + rank()).energy_kwh is None
    assert Footprint.zero() + host(1.0) == host(1.0) == host(1.0) + Footprint.zero()


def test_addition_of_job_shares():
    one = gathered([host(1.0, scope="job"), rank(4.0)], local_ranks=[0, 1])
    two = gathered([host(1.0, scope="job"), rank(12.0)], local_ranks=[0, 1])
    assert (one + two).details["job_share"] == pytest.approx(0.75)


def test_json_round_trip():
    assert Footprint.from_json(host(1.0).to_json()) == host(1.0)
    assert Footprint.from_json(NullMeterFootprint.to_json()) == NullMeterFootprint


@pytest.mark.parametrize(
    "value", [{}, {"seconds": -1}, {"seconds": True}, {"seconds": 1, "energy_kwh": math.nan}, {"seconds": "1"}]
)
def test_json_that_is_damaged(value):
    with pytest.raises(ConfigError, match="is not a number >= 0"):
        Footprint.from_json(value)


@pytest.mark.parametrize(
    "values", [{"pue": 0.9}, {"usd_per_kwh": -1}, {"carbon_intensity_g_per_kwh": math.inf}, {"usd_per_host_hour": -0.1}]
)
def test_tariff_refuses(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Tariff(**values)


def test_tariff():
    tariff = Tariff(carbon_intensity_g_per_kwh=400.0, usd_per_kwh=0.5, usd_per_host_hour=3.6)
    assert tariff.co2_kg(2.0) == pytest.approx(0.8)
    assert tariff.cost_usd(2.0, seconds=10.0) == pytest.approx(1.01)
    assert Tariff().co2_kg(1.0) is None
    assert Tariff().cost_usd(1.0, seconds=1.0) is None


def test_null_meter():
    clock = Clock()
    meter = NullMeter(clock=clock)
    meter.start()
    clock.now += 3
    assert meter.stop() == Footprint(3.0, None, None, None, "not metered")
    meter.start()
    assert meter.stop().seconds == 0.0


def test_rank_meter_reads_cpu_time():
    meter = RankMeter()
    meter.start()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    footprint = meter.stop()
    assert 0.08 <= footprint.details["rank_cpu_s"] <= footprint.seconds * 8 + 0.1
    assert footprint.energy_kwh is None


@pytest.mark.parametrize("make", [NullMeter, RankMeter, lambda: ReplayMeter(trace=[[0, 1]])])
def test_meters_refuse_a_wrong_order(make):
    meter = make()
    with pytest.raises(ConfigError, match="does not run"):
        meter.stop()
    meter.start()
    with pytest.raises(ConfigError, match="already runs"):
        meter.start()


def test_for_rank():
    meter = ReplayMeter(trace=[[0, 1]])
    assert for_rank(meter, local_rank=0) is meter
    assert isinstance(for_rank(meter, local_rank=1), RankMeter)
    null = NullMeter()
    assert for_rank(null, local_rank=1) is null


def test_replay_integrates_the_trace_over_stages():
    clock = Clock()
    meter = ReplayMeter(trace=[[0, 100], [10, 200]], carbon_intensity_g_per_kwh=360.0, usd_per_kwh=0.5, clock=clock)
    meter.start()
    clock.now += 15
    first = meter.stop()
    assert first.energy_kwh == pytest.approx((10 * 100 + 5 * 200) / 3.6e6)
    assert first.co2_kg == pytest.approx(first.energy_kwh * 0.36)
    assert first.cost_usd == pytest.approx(first.energy_kwh * 0.5)
    assert first.method.startswith("replayed")
    assert first.details["carbon_intensity_g_per_kwh"] == 360.0
    clock.now += 1000
    meter.start()
    clock.now += 36
    second = meter.stop()
    assert second.seconds == 36.0
    assert second.energy_kwh == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([], "second 0"),
        ([[1, 5]], "second 0"),
        ([[0, 5], [0, 6]], "increase"),
        ([[0, -5]], "negative"),
        ([[0, 1, 2]], "pair"),
    ],
)
def test_replay_refuses(trace, message):
    with pytest.raises(ConfigError, match=message):
        ReplayMeter(trace=trace)
