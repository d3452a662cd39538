"""From the job's config to a running driver: ``launch=local`` or ``launch=hosts`` with ``strategy=elastic``."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from horovod_jobs.comm.interfaces import loopback, own_address
from horovod_jobs.config import ElasticConfig, LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, environment
from horovod_jobs.launch.elastic.describe import described
from horovod_jobs.launch.elastic.discovery import Discovery, Fixed, discovery
from horovod_jobs.launch.elastic.driver import Driver, Journal
from horovod_jobs.launch.elastic.entries import Rules
from horovod_jobs.launch.elastic.screening import AGAIN_S, Screened
from horovod_jobs.launch.elastic.spawn import LocalSpawner, MixedSpawner, Spawner, SshSpawner
from horovod_jobs.launch.hosts.judging import Finding

_LOOPBACK = "127.0.0.1"
_UNBOUNDED = 4096


@dataclass(frozen=True)
class ElasticPlan(LaunchPlan):
    """What a member runs, and where the run is written."""

    run_dir: Path = Path()
    roots: tuple[str, ...] = ()  # absolute: directories that hosts must share


def check(launch: LaunchConfig) -> None:
    """Values that cannot work.

    Raises:
        ConfigError: naming the key.
    """
    elastic = launch.elastic
    if launch.kind not in ("local", "hosts"):
        raise ConfigError(
            f"strategy=elastic cannot be started by launch={launch.kind}; use launch=local or launch=hosts"
        )
    if launch.controller == "mpi":
        raise ConfigError("strategy=elastic needs Gloo: ranks of MPI cannot leave; use launch.controller=auto, or gloo")
    if not 1 <= elastic.min_np <= _most(launch):
        raise ConfigError(
            f"launch.elastic.min_np={elastic.min_np} does not fit launch.elastic.max_np={_most(launch)}; use 1 to max_np"
        )
    for key in ("discovery_every_s", "start_s", "beat_s", "lease_s", "return_s", "gloo_timeout_s", "slots"):
        if getattr(elastic, key) <= 0:
            raise ConfigError(
                f"launch.elastic.{key}={getattr(elastic, key)} is not positive; leave it out for the default"
            )
    for key in ("wait_s", "cooldown_s", "reset_limit"):
        if getattr(elastic, key) < 0:
            raise ConfigError(f"launch.elastic.{key}={getattr(elastic, key)} is negative; use 0 or more")
    if elastic.lease_s < 4 * elastic.beat_s:
        raise ConfigError(
            f"launch.elastic.lease_s={elastic.lease_s} is less than four beats of {elastic.beat_s} s; make it longer"
        )


def _most(launch: LaunchConfig) -> int:
    if launch.elastic.max_np is not None:
        return launch.elastic.max_np
    return _UNBOUNDED if launch.elastic.discovery is not None else launch.np


def plan(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> ElasticPlan:
    """What every rank runs. All worlds of a job write into one run, so its id is chosen here where the person gave none.

    Raises:
        ConfigError: a value that cannot work, or a variable of ``launch.env`` that is not set.
        SetupError: Horovod is not installed.
    """
    check(launch)
    run: Mapping[str, Any] = job.config.get("run", {})
    if int(run.get("parallel_stages") or 1) > 1:
        raise ConfigError(
            f"run.parallel_stages={run['parallel_stages']} needs a world that stays as it is; use 1 with strategy=elastic"
        )
    if not host.has_horovod:
        raise SetupError(
            "strategy=elastic needs Horovod, which is not installed; build it with launch/build_horovod.sh"
        )
    run_id = run.get("id") or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    argv = [*job.argv(host.python), f"run.id='{run_id}'"]
    env = environment(replace(launch, np=max(1, launch.np)), host=host, environ=environ)
    env.pop(TERMINAL_VARIABLE, None)  # Bars of one world would stay on the screen beside those of the next.
    root, store = str(run.get("root", "runs")), str(run.get("store", "artifacts"))
    roots = (os.path.abspath(root), os.path.abspath(store))
    return ElasticPlan(argv, env, "gloo", run_dir=Path(root) / run_id, roots=roots)


def shown_as(launch: LaunchConfig, planned: ElasticPlan) -> ElasticPlan:
    """The plan with what the driver will do, for a person. Discovery is not asked.

    Raises:
        ConfigError: hosts that cannot be read, or none.
    """
    fixed = launch.elastic.discovery is None
    hosts = ({"localhost": launch.np} if launch.kind == "local" else _named(launch)) if fixed else {}
    told = described(
        launch, planned, rules=_rules(launch), hosts=hosts, own=socket.gethostname(), directory=str(Path.cwd())
    )
    return replace(planned, files=told)


def start(launch: LaunchConfig, planned: ElasticPlan) -> int:
    """Run the driver. Gives the job's exit code.

    Raises:
        SetupError: a discovery that cannot be used, or hosts that are not reached.
        WorldError: too many ranks were lost, or too few are left.
    """
    elastic = launch.elastic
    journal = Journal(planned.run_dir / "elastic.jsonl")
    found, spawner, address, interface = _places(launch, planned, journal)
    driver = Driver(
        _rules(launch),
        discovery=found,
        spawner=spawner,
        journal=journal,
        address=address,
        interface=interface,
        beat_s=elastic.beat_s,
        gloo_timeout_s=elastic.gloo_timeout_s,
        discovery_every_s=elastic.discovery_every_s,
        grace_s=launch.grace_s,
    )
    return driver.run()


def _rules(launch: LaunchConfig) -> Rules:
    elastic = launch.elastic
    return Rules(
        min_np=elastic.min_np,
        max_np=_most(launch),
        start_s=elastic.start_s,
        wait_s=elastic.wait_s,
        lease_s=elastic.lease_s,
        return_s=elastic.return_s,
        cooldown_s=elastic.cooldown_s,
        reset_limit=elastic.reset_limit,
    )


def _places(launch: LaunchConfig, planned: ElasticPlan, journal: Journal) -> tuple[Discovery, Spawner, str, str]:
    """Which hosts, how ranks start there, the address of the driver, and the ranks' interface; empty: the one that leads to the driver."""
    elastic = launch.elastic
    local = LocalSpawner(planned.argv, planned.env)
    if launch.kind == "local":
        found = Fixed({"localhost": launch.np}) if elastic.discovery is None else _discovery(elastic)
        return found, local, _LOOPBACK, loopback()
    from horovod_jobs.launch.hosts.plan import ssh_options

    found = _screened(launch, planned, journal)
    own = socket.gethostname()
    first = _first_host(found, own=own, within_s=elastic.start_s)
    address, _ = own_address(launch.hosts.interface, towards=first)
    ssh = SshSpawner(["ssh", *ssh_options(launch.hosts)], planned.argv, planned.env, str(Path.cwd()))
    return found, MixedSpawner(local, ssh, own=own), address, launch.hosts.interface or ""


def _named(launch: LaunchConfig) -> dict[str, int]:
    """Hosts of the config.

    Raises:
        ConfigError: there are none, and no discovery either.
    """
    from horovod_jobs.launch.hosts.plan import named_hosts

    named = {one.name: one.count for one in named_hosts(launch.hosts)}
    if not named and launch.elastic.discovery is None:
        raise ConfigError("launch=hosts names no hosts; add launch.hosts.list=[a:4,b:4], or launch.elastic.discovery")
    return named


def _screened(launch: LaunchConfig, planned: ElasticPlan, journal: Journal) -> Screened:
    """The hosts that there are, each looked at as by ``launch=hosts`` before ranks start there."""
    from horovod_jobs.launch.hosts.checks import look_at
    from horovod_jobs.launch.hosts.plan import wanted_of

    def look(hosts: Sequence[str]) -> list[Finding]:
        return look_at(wanted_of(launch, hosts, env=planned.env, python=planned.argv[0], roots=planned.roots))

    def fault(host: str, why: str) -> None:
        told = f"host {host} is left out: {why}; it is looked at again, every {AGAIN_S:g} s in the end, and joins when it can"
        journal.note("left_out", host=host, why=why, shown=told)

    fixed = launch.elastic.discovery is None
    found = Fixed(_named(launch)) if fixed else _discovery(launch.elastic)
    return Screened(found, look=look, fault=fault, alone=fixed)


def _first_host(found: Discovery, *, own: str, within_s: float) -> str:
    """A host of the job, another than this one if possible, as soon as there is one: the way to it is the job's interface."""
    deadline = time.monotonic() + within_s
    while not (hosts := found.find()):
        if time.monotonic() > deadline:
            raise SetupError(
                f"launch.elastic.discovery has named no host that can be used for {within_s:g} s (start_s); run it by hand"
            )
        time.sleep(1.0)
    return next((host for host in hosts if host != own), own)


def _discovery(elastic: ElasticConfig) -> Discovery:
    return discovery(elastic.discovery, slots=elastic.slots)
