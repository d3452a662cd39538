"""``launch=local``: a world on this host, by tuned MPI where that is installed and by Gloo otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from horovod_jobs.config import LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.errors import SetupError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, environment
from horovod_jobs.launch.process import run_world

# Measured (docs/training.md): a step of a small transformer takes 1.8x as long where idle ranks do not yield their core.
TUNED_MPI = ("--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "self,sm", "--mca", "pml", "ob1",
              "--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "4")  # fmt: skip


# ULFM: who talks to a rank that has died gets an error, and mpirun does not end the others.
OUTLIVE_RANKS = ("--with-ft", "ulfm")


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
    survive = OUTLIVE_RANKS if outlives_ranks and host.has_ulfm else ()
    if controller == "mpi":
        return LaunchPlan([str(host.mpirun), "-np", str(launch.np), "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE",
                           *TUNED_MPI, *survive, *command], env, controller)  # fmt: skip
    if host.horovodrun is None:
        raise SetupError("launch.controller=gloo needs horovodrun, which is not installed; run launch/install.sh")
    env.pop(TERMINAL_VARIABLE, None)  # horovodrun writes the rank before each line, which would tear bars apart.
    return LaunchPlan([host.horovodrun, "--gloo", "-np", str(launch.np), *command], env, controller)


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
    """``plan`` for a job's command."""
    return plan(launch, host=host, environ=environ, command=job.argv(host.python), outlives_ranks=job.outlives_ranks)


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Run the world and wait for it."""
    return run_world(planned, grace_s=launch.grace_s)
