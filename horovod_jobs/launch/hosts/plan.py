"""``launch=hosts``: a world over hosts that are reached by ssh, by MPI or by Gloo, started after every host has been checked."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horovod_jobs.config import HostsConfig, LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch import mpi
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, environment
from horovod_jobs.launch.hosts.checks import Checked, check
from horovod_jobs.launch.hosts.hub import Station, run_stations
from horovod_jobs.launch.hosts.judging import Wanted
from horovod_jobs.launch.in_rank import DIRECTORY_VARIABLE
from horovod_jobs.launch.process import run_world

_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\s*:\s*(?P<colon>\d+)|\s+slots\s*=\s*(?P<slots>\d+))?$")
# What belongs to one host and must not follow the job to another.
_OWN = ("HOSTNAME", "TMPDIR", "TERM", "SHELL", "USER", "LOGNAME", "HOME", "XDG_CACHE_HOME")
# mpirun passes these on to ranks everywhere, where SIGTERM and SIGINT would make it kill them within a second.
FORWARD = {"SIGTERM": "SIGUSR1", "SIGUSR1": "SIGUSR1", "SIGINT": "SIGUSR2"}
_FORMS = "write HOST:SLOTS (a:4), or in a file HOST slots=SLOTS"


@dataclass(frozen=True)
class Slots:
    """A host and how many ranks it takes."""

    name: str
    count: int


@dataclass(frozen=True)
class HostsPlan(LaunchPlan):
    """What to run on which host. ``argv`` is mpirun's command, or for Gloo what every rank runs."""

    hosts: tuple[Slots, ...] = ()  # with the ranks that each gets, in the order of ranks
    named: tuple[str, ...] = ()  # variables of env that travel to the other hosts
    python: str = sys.executable
    directories: tuple[str, ...] = ()  # run.root and run.store


def parse(text: str, *, where: str) -> Slots:
    """``a:4``, ``a slots=4`` or ``a`` (one slot).

    Raises:
        ConfigError: it is none of these, or the number of slots is 0.
    """
    found = _LINE.match(text.strip())
    if found is None:
        raise ConfigError(f"{where}: {text.strip()!r} is not a host; {_FORMS}")
    slots = int(found["colon"] or found["slots"] or 1)
    if slots < 1:
        raise ConfigError(f"{where}: {text.strip()!r} has no slot; give it 1 or more, or leave the host out")
    return Slots(found["name"], slots)


def named_hosts(config: HostsConfig) -> tuple[Slots, ...]:
    """The hosts that the config names; none where it names none. A host named twice has the slots of both.

    Raises:
        ConfigError: both forms are given, a line cannot be read, or the file cannot.
    """
    if config.list and config.file:
        raise ConfigError(f"launch.hosts.list and launch.hosts.file={config.file} both name hosts; use one of them")
    entries = [(text, "launch.hosts.list") for text in config.list]
    if config.file:
        try:
            lines = Path(config.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"launch.hosts.file={config.file} cannot be read ({error}); check the path") from error
        stripped = [(line.split("#")[0].strip(), f"{config.file}:{number}") for number, line in enumerate(lines, 1)]
        entries = [(line, where) for line, where in stripped if line]
    found: dict[str, int] = {}
    for text, where in entries:
        one = parse(text, where=where)
        found[one.name] = found.get(one.name, 0) + one.count
    return tuple(Slots(name, count) for name, count in found.items())


def count(launch: LaunchConfig) -> int:
    """Every slot of the named hosts."""
    return sum(one.count for one in named_hosts(launch.hosts))


def filled(hosts: Sequence[Slots], *, ranks: int) -> tuple[Slots, ...]:
    """The ranks that each host gets: hosts are filled in their order, those that get none are left out.

    Raises:
        ConfigError: there are more ranks than slots, or no hosts.
    """
    if not hosts:
        raise ConfigError(
            "launch=hosts names no hosts; add launch.hosts.list=[a:4,b:4] or launch.hosts.file=PATH, or use launch=local"
        )
    total = sum(one.count for one in hosts)
    if not 1 <= ranks <= total:
        raise ConfigError(
            f"launch.np={ranks} does not fit the {total} slots of {', '.join(f'{one.name}:{one.count}' for one in hosts)}; "
            f"use 1 to {total}, 0 for all of them, or give the hosts more slots"
        )
    given = []
    for one in hosts:
        taken = min(one.count, ranks)
        ranks -= taken
        if taken:
            given.append(Slots(one.name, taken))
    return tuple(given)


def ssh_options(config: HostsConfig) -> list[str]:
    """Options of ssh: never ask, give up in time, notice a dead host, and check its key unless told otherwise."""
    pairs = {
        "BatchMode": "yes",
        "ConnectTimeout": str(config.connect_timeout_s),
        "ServerAliveInterval": str(config.keepalive_s),
        "ServerAliveCountMax": "3",
        "StrictHostKeyChecking": "yes" if config.check_host_keys else "no",
    }
    if not config.check_host_keys:
        pairs |= {"UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
    return [word for key, value in pairs.items() for word in ("-o", f"{key}={value}")]


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> HostsPlan:
    """What to start on which host. Pure, but for the host file. The networks between the hosts are added by ``over``.

    Raises:
        ConfigError: hosts or ranks that do not work out, or a variable of ``launch.env`` that is not set.
        SetupError: Horovod, MPI or mpi4py is not there.
    """
    hosts = filled(named_hosts(launch.hosts), ranks=launch.np)
    if not host.has_horovod:
        raise SetupError("launch=hosts needs Horovod, which is not installed; build it with launch/build_horovod.sh")
    ready = host.mpirun is not None and host.has_mpi4py
    controller = launch.controller if launch.controller != "auto" else ("mpi" if ready else "gloo")
    if controller == "mpi" and not ready:
        missing = "mpirun" if host.mpirun is None else "mpi4py"
        raise SetupError(
            f"launch.controller=mpi needs {missing}, which is not installed; run launch/install.sh, or use gloo"
        )
    env = environment(launch, host=host, environ=environ)
    if not launch.threads and "OMP_NUM_THREADS" not in environ:
        del env["OMP_NUM_THREADS"]  # Each rank shares its own host's cores out (in_rank.set_threads).
    named = tuple(sorted(name for name in env if name not in _OWN and not name.startswith(("OMPI_", "PRTE_", "PMIX_"))))
    directories = tuple(str(job.config.get("run", {}).get(key, key)) for key in ("root", "store"))
    base = HostsPlan([], env, controller, hosts=hosts, named=named, python=host.python, directories=directories)
    command = job.argv(host.python)
    if controller == "gloo":
        return replace(base, argv=command, files={"on each host, by ssh": _shown(launch, base)})
    settings = mpi.over_hosts(hosts=len(hosts), servers=job.has_servers, own=launch.env)
    mpirun = _mpirun(launch, base, mpirun=str(host.mpirun), settings=settings)
    survive = mpi.OUTLIVE_RANKS if job.outlives_ranks and host.has_ulfm else ()
    return replace(base, argv=[*mpirun, *survive, *command])


def _mpirun(launch: LaunchConfig, base: HostsPlan, *, mpirun: str, settings: Mapping[str, str]) -> list[str]:
    over = ",".join(f"{one.name}:{one.count}" for one in base.hosts)
    argv = [
        mpirun,
        "-np",
        str(sum(one.count for one in base.hosts)),
        "-H",
        over,
        "--map-by",
        "slot",
        "--bind-to",
        "none",
    ]
    # Only this host starts daemons: a daemon that starts further ones gets the agent cut off at its first "=".
    argv += ["--prtemca", "plm_ssh_agent", shlex.join(["ssh", *ssh_options(launch.hosts)]),
             "--prtemca", "plm_ssh_no_tree_spawn", "1"]  # fmt: skip
    argv += mpi.options(settings)
    if launch.hosts.interface:
        argv += _networks([launch.hosts.interface])
    # A name without a value: mpirun sends the value to its daemons, and no command line shows it.
    return argv + [word for name in base.named for word in ("-x", name)]


def _networks(found: Sequence[str]) -> list[str]:
    """Options that keep MPI to networks: interface names, or subnets (10.0.0.0/24) where names differ between hosts."""
    listed = ",".join(found)
    return ["--mca", "btl_tcp_if_include", listed, "--prtemca", "prte_if_include", listed] if found else []


def _shown(launch: LaunchConfig, base: HostsPlan) -> str:
    ssh = shlex.join(["ssh", *ssh_options(launch.hosts)])
    rows = [f"{ssh} {one.name} {base.python} -c ...    # {one.count} ranks" for one in base.hosts]
    return "\n".join([*rows, f"variables that travel inside ssh: {' '.join(base.named)}"])


def over(launch: LaunchConfig, planned: HostsPlan, *, networks: Sequence[str]) -> HostsPlan:
    """The plan of MPI, kept to the networks that the checks found; where an interface is named, it is in the plan already."""
    if launch.hosts.interface or planned.controller != "mpi" or not networks:
        return planned
    at = planned.argv.index("--mca")
    return replace(planned, argv=[*planned.argv[:at], *_networks(networks), *planned.argv[at:]])


def wanted_of(
    launch: LaunchConfig, hosts: Sequence[str], *, env: Mapping[str, str], python: str, roots: Sequence[str]
) -> Wanted:
    """What hosts are held to. ``roots``: the directories that they must share."""
    return Wanted(
        hosts=tuple(hosts),
        ssh=("ssh", *ssh_options(launch.hosts)),
        python=python,
        path=env.get("PYTHONPATH", ""),
        directories=tuple(roots),
        interface=launch.hosts.interface,
        clock_limit_s=launch.hosts.clock_limit_s,
        disk_free_mb=launch.hosts.disk_free_mb,
        timeout_s=launch.hosts.connect_timeout_s + 20.0,
    )


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Check every host, then run the world and wait for it. Gives the job's exit code.

    Raises:
        SetupError: a check failed; the message names the host, what it is, the value and the remedy.
    """
    assert isinstance(planned, HostsPlan)
    roots = tuple(os.path.abspath(path) for path in planned.directories)
    wanted = wanted_of(launch, [one.name for one in planned.hosts], env=planned.env, python=planned.python, roots=roots)
    checked = check(wanted)
    if planned.controller == "gloo":
        stations = _stations(launch, planned, checked)
        return run_stations(stations, grace_s=launch.grace_s, keepalive_s=launch.hosts.keepalive_s)
    ready = over(launch, planned, networks=checked.networks)
    if not checked.first_is_here:
        # mpirun's own code is the job's: files that ranks leave on another host would not be seen here.
        return run_world(ready, grace_s=launch.grace_s, forward=FORWARD, recorded=False)
    argv = [*ready.argv[:1], "-x", DIRECTORY_VARIABLE, *ready.argv[1:]]
    with tempfile.TemporaryDirectory(prefix=".launch-", dir=roots[0]) as directory:
        ready = replace(ready, argv=argv)
        return run_world(ready, grace_s=launch.grace_s, forward=FORWARD, directory=Path(directory))


def rank_variables(hosts: Sequence[Slots], interfaces: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """What each rank of each host has in its environment, as Horovod's Gloo reads it."""
    size, found, rank = sum(one.count for one in hosts), {}, 0
    for one in hosts:
        interface = interfaces[one.name]
        found[one.name] = [{
            "HOROVOD_HOSTNAME": one.name, "HOROVOD_RANK": str(rank + local), "HOROVOD_SIZE": str(size),
            "HOROVOD_LOCAL_RANK": str(local), "HOROVOD_LOCAL_SIZE": str(one.count),
            "HOROVOD_CROSS_RANK": str([other.name for other in hosts if other.count > local].index(one.name)),
            "HOROVOD_CROSS_SIZE": str(sum(other.count > local for other in hosts)),
            "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": interface,
            "NCCL_SOCKET_IFNAME": interface, "PYTHONUNBUFFERED": "1",
        } for local in range(one.count)]  # fmt: skip
        rank += one.count
    return found


def _stations(launch: LaunchConfig, planned: HostsPlan, checked: Checked) -> list[Station]:
    """One a host: how it is reached, and the variables of each of its ranks."""
    variables = rank_variables(planned.hosts, checked.interfaces)
    stations = []
    for one in planned.hosts:
        here = one.name in checked.here
        reach = [planned.python] if here else ["ssh", *ssh_options(launch.hosts), one.name, shlex.quote(planned.python)]
        env = {name: planned.env[name] for name in planned.named}
        if here:
            env = dict(planned.env)  # What belongs to this host (HOME, TMPDIR) may stay.
        stations.append(Station(one.name, reach, planned.argv, os.getcwd(), env, variables[one.name], here=here))
    return stations
