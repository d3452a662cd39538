"""A run's totals: what it spent, also on what it could not finish; unknown is not zero."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.errors import ConfigError, Interrupted
from horovod_jobs.job import Job
from horovod_jobs.record import Record, bill

SPENT = bill({"seconds": 5.0, "energy_kwh": 2.0, "co2_kg": 0.5, "cost_usd": 0.1, "method": "measured"})


@pytest.fixture
def record(tmp_path: Path) -> Record:
    stages = {name: SimpleNamespace(kind="train", needs={}) for name in ("first", "second", "third")}
    config = SimpleNamespace(name="job", run=SimpleNamespace(store=str(tmp_path / "artifacts")))
    job = cast("Job", SimpleNamespace(config=config, stages=stages, resolved={}))
    return Record(job, SingleWorld(), run_dir=tmp_path, command=["horovod-jobs"], origin={})


def end(record: Record, error: BaseException) -> dict[str, Any]:
    record.end(error, log=logging.getLogger(__name__))
    totals: dict[str, Any] = record.manifest["totals"]
    return totals


def test_before_any_stage_nothing_is_spent(record: Record) -> None:
    assert end(record, Interrupted("stopped"))["energy_kwh"] == 0


def test_a_stage_that_was_stopped_is_paid_for(record: Record) -> None:
    record.stage("first", status="ran", **SPENT)
    record.stage("second", status="running")
    record.stage("second", **SPENT)
    totals = end(record, Interrupted("stopped"))
    assert (totals["energy_kwh"], totals["co2_kg"], totals["cost_usd"]) == (4.0, 1.0, 0.2)
    assert record.manifest["stages"][1]["status"] == "pending"
    assert record.manifest["stages"][1]["seconds"] == 5.0


def test_what_a_failed_stage_cost_is_unknown(record: Record) -> None:
    record.stage("first", status="ran", **SPENT)
    record.stage("second", status="running")
    totals = end(record, ConfigError("wrong"))
    assert totals["energy_kwh"] is None
    assert totals["seconds"] >= 0


def test_a_reused_stage_costs_this_run_nothing(record: Record) -> None:
    record.stage("first", status="running")
    record.stage("first", status="reused", **SPENT)
    record.write()
    assert record.manifest["totals"]["energy_kwh"] == 0
    assert record.manifest["totals"]["artifacts"]["energy_kwh"] == 2.0
