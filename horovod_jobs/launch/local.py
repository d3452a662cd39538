"""``launch=local``: a world on this host, by tuned MPI where that is installed and by Gloo otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import SetupError
from horovod_jobs.launch import mpi
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, environment
from horovod_jobs.launch.process import run_world

_HERE = "localhost"
_KEEPALIVE_S = 3600.0  # No network lies between: a launcher that a person has suspended is not a host that was cut off.


def plan(
    launch: LaunchConfig,
    *,
    host: Host,
    environ: Mapping[str, str],
    command: Sequence[str],
    outlives_ranks: bool = False,
) -> LaunchPlan:
    """The command that starts ``launch.np`` ranks of ``command`` on this host. Pure.

    Raises:
        SetupError: Horovod, MPI or mpi4py is not there (the message says how to get it).
        ConfigError: a variable named in ``launch.env`` is not set.
    """
    if not host.has_horovod:
        raise SetupError(
            f"launch.np={launch.np} asks for a world of ranks and Horovod is not installed; build it with launch/build_horovod.sh "
            "(launch/install.sh does this), or use launch=none for one process"
        )
    mpi_ready = host.mpirun is not None and host.has_mpi4py
    controller = launch.controller if launch.controller != "auto" else ("mpi" if mpi_ready else "gloo")
    if controller == "mpi" and not mpi_ready:
        missing = "mpirun" if host.mpirun is None else "mpi4py"
        raise SetupError(
            f"launch.controller=mpi needs {missing}, which is not installed; run launch/install.sh, or use gloo"
        )
    env = environment(launch, host=host, environ=environ)
    survive = mpi.OUTLIVE_RANKS if outlives_ranks and host.has_ulfm else ()
    if controller == "gloo":
        return LaunchPlan(list(command), env, controller, files={f"by {launch.np} ranks, which Gloo joins": ""})
    return LaunchPlan([str(host.mpirun), "-np", str(launch.np), "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE",
                       *mpi.options(mpi.LOCAL), *survive, *command], env, controller)  # fmt: skip


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
    """``plan`` for a job's command."""
    return plan(launch, host=host, environ=environ, command=job.argv(host.python), outlives_ranks=job.outlives_ranks)


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Run the world and wait for it."""
    if planned.controller == "mpi":
        return run_world(planned, grace_s=launch.grace_s)
    # Not by horovodrun, which listens for the ranks on every interface and shows their variables on its command line.
    from horovod_jobs.comm.interfaces import loopback
    from horovod_jobs.launch.hosts.hub import Station, run_stations
    from horovod_jobs.launch.hosts.plan import Slots, rank_variables

    ranks = rank_variables([Slots(_HERE, launch.np)], {_HERE: loopback()})[_HERE]
    here = Station(_HERE, [sys.executable], planned.argv, os.getcwd(), planned.env, ranks, here=True)
    return run_stations([here], grace_s=launch.grace_s, keepalive_s=_KEEPALIVE_S)
