"""CodeCarbon's tracker as a meter: no network, no file, no log line, and honest about what it read."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from horovod_jobs import footprint
from horovod_jobs.errors import ConfigError
from horovod_jobs.footprint import CodeCarbonMeter, across_hosts

CONF = Path(__file__).parents[3] / "conf" / "footprint"


class One:
    local_rank = 0

    def gather_json(self, value, *, name):
        return [value]


def burn(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the meter asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def meter(no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return CodeCarbonMeter(country_iso_code="deu", cpu_tdp_w=100.0, ram_w=10.0, usd_per_kwh=0.25, pue=1.5)


def test_it_meters_stages_quietly(meter, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    meter.start()
    burn(0.3)
    first = meter.stop()
    before = time.perf_counter()
    meter.start()
    second = meter.stop()
    assert time.perf_counter() - before < 0.5  # Only the first start opens the hardware.
    assert first.seconds == pytest.approx(0.3, abs=0.2)
    assert second.seconds < 0.3
    # RAM is a constant power here, so its energy is known: watts x seconds x PUE.
    assert first.details["ram_kwh"] == pytest.approx(10 * first.seconds * 1.5 / 3.6e6, rel=0.1)
    # A CPU draws between a tenth of its TDP and all of it; this one is busy on one core at least.
    cpu_w = first.details["cpu_kwh"] * 3.6e6 / first.seconds / 1.5
    assert 10 <= cpu_w <= 105
    assert first.energy_kwh == pytest.approx(sum(first.details[key] for key in ("cpu_kwh", "ram_kwh", "gpu_kwh")))
    assert second.energy_kwh < first.energy_kwh
    assert first.co2_kg == pytest.approx(first.energy_kwh * first.details["carbon_intensity_g_per_kwh"] / 1000)
    assert first.cost_usd == pytest.approx(first.energy_kwh * 0.25)
    assert "given TDP of 100 W" in first.method
    assert "estimated" in first.method
    assert first.details["country"] == "DEU"
    assert first.details["pue"] == 1.5
    assert 20 < first.details["carbon_intensity_g_per_kwh"] < 1000
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("codecarbon")]


def test_the_job_gets_its_share(meter):
    meter.start()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    local = meter.stop()
    job = across_hosts(local, One())
    assert 0.28 < local.details["rank_cpu_s"] < 1.0
    assert 0 < job.details["job_share"] <= 1
    assert job.energy_kwh == pytest.approx(local.energy_kwh * job.details["job_share"], rel=1e-6)


def test_scope_machine_charges_everything(no_network):
    meter = CodeCarbonMeter(country_iso_code="DEU", scope="machine", carbon_intensity_g_per_kwh=100.0)
    meter.start()
    local = meter.stop()
    assert across_hosts(local, One()).energy_kwh == local.energy_kwh
    assert local.details["carbon_intensity_g_per_kwh"] == 100.0
    assert local.cost_usd is None


def test_regions_have_their_own_intensity(no_network):
    intensities = []
    for region in (None, "california"):
        meter = CodeCarbonMeter(country_iso_code="USA", region=region, cpu_tdp_w=10, ram_w=1)
        meter.start()
        intensities.append(meter.stop().details["carbon_intensity_g_per_kwh"])
    assert intensities[0] != intensities[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"country_iso_code": "XYZ"}, "'XYZ' is not among"),
        ({"country_iso_code": "USA", "region": "atlantis"}, "'atlantis' of USA"),
        ({"country_iso_code": "DEU", "region": "hessen"}, "'hessen' of DEU"),
        ({"country_iso_code": "SWE", "region": "SE9"}, "'SE9' of SWE"),
    ],
)
def test_unknown_places_are_errors_and_no_silent_mean(no_network, values, message):
    with pytest.raises(ConfigError, match=message):
        CodeCarbonMeter(**values).start()


@pytest.mark.parametrize(
    "values", [{"scope": "rank"}, {"sample_s": 1}, {"cpu_tdp_w": -1}, {"pue": 0.5}, {"usd_per_kwh": -2}]
)
def test_bad_values_are_named_at_construction(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        CodeCarbonMeter(country_iso_code="DEU", **values)


@pytest.mark.parametrize("name", ["codecarbon", "none", "replay"])
def test_configs_name_a_meter_and_its_arguments(name):
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    module, _, cls = node.pop("_target_").rpartition(".")
    assert module == "horovod_jobs.footprint"
    meter = getattr(footprint, cls)(**node)
    assert callable(meter.start)
    assert callable(meter.stop)
