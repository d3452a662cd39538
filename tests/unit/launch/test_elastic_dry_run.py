"""What ``launch.dry_run=true`` shows of an elastic job: the driver, each host, and what a rank runs; held to golden files."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs.config import ElasticConfig, HostsConfig, LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.launch.base import meant
from horovod_jobs.launch.elastic.job import plan, shown_as
from horovod_jobs.launch.starting import shown
from tests.unit.launch.support_launch import ENVIRON, HOST, golden, job


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "login")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me/jobs"))


def text(**changes: Any) -> str:
    launch = LaunchConfig(**{"kind": "local", "np": 2, **changes})
    command = replace(job(), config={"run": {"root": "runs", "store": "artifacts", "id": "mine"}})
    return shown(shown_as(launch, plan(launch, job=command, host=HOST, environ=ENVIRON))) + "\n"


def test_a_local_job() -> None:
    golden("elastic_local.txt", text())


def test_a_job_over_hosts() -> None:
    golden("elastic_hosts.txt", text(kind="hosts", np=8, hosts=HostsConfig(list=["login:2", "a:4", "b:4"])))


def test_a_job_whose_hosts_are_discovered() -> None:
    """Discovery is not asked: the script need not be there."""
    elastic = ElasticConfig(discovery="./hosts.sh", min_np=2, slots=4)
    golden("elastic_discovered.txt", text(kind="hosts", hosts=HostsConfig(interface="eth1"), elastic=elastic))


def test_no_hosts_are_an_error_already_then() -> None:
    with pytest.raises(ConfigError, match="launch=hosts names no hosts"):
        text(kind="hosts", np=2)


def test_the_wish_to_see_a_job_first_is_no_part_of_it() -> None:
    words = (
        "launch=local",
        "launch.dry_run=true",
        "++launch.dry_run=true",
        "~launch.dry_run",
        "name=launch.dry_run",
        "a=1",
    )
    assert meant(words) == ("launch=local", "name=launch.dry_run", "a=1")
