"""From ``launch=KIND`` to a running world, or to the text of what would run (``launch.dry_run=true``)."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Protocol, cast

from horovod_jobs import early
from horovod_jobs.config import LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.early import COMMAND_VARIABLE
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, this_host

KINDS = {
    "local": "horovod_jobs.launch.local",
    "hosts": "horovod_jobs.launch.hosts.plan",
    "slurm": "horovod_jobs.launch.slurm.plan",
    "docker": "horovod_jobs.launch.docker",
    "mpijob": "horovod_jobs.launch.kubernetes.mpijob",
    "trainjob": "horovod_jobs.launch.kubernetes.trainjob",
}
_OUTLIVED = ("slurm", "mpijob", "trainjob")  # The job runs elsewhere, and goes on when the process here ends.
_DRIVER_INSIDE = ("docker", "mpijob")  # The driver of an elastic job runs where they start it.
_swept: list[tuple[LaunchConfig, JobCommand]] = []

# Exit codes after which a new start would end the same way, or was not wanted: done, an error that a person must mend, a stop on request.
FINAL = (0, 2, 3, 4, 5, 6, 7, 8, 75, 130, 143)


class Launcher(Protocol):
    """What the module of a kind has."""

    def plan_job(self, launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
        """What to run and with which files. Pure: it looks at its arguments only."""

    def start(self, launch: LaunchConfig, planned: LaunchPlan) -> int:
        """Run the plan; gives the job's exit code."""


def counted_ranks(launch: LaunchConfig) -> int:
    """``launch.np``, or the number that the launcher's own section comes to where that is 0.

    Raises:
        ConfigError: the section cannot be read.
    """
    if launch.np != 0 or launch.kind not in ("hosts", "slurm"):
        return launch.np
    counted: int = importlib.import_module(KINDS[launch.kind]).count(launch)
    return counted


def start(launch: LaunchConfig, *, job: JobCommand, elastic: bool = False) -> int:
    """Run the job in a world of its own, or with ``elastic`` in one world after another. Gives the job's exit code.

    Ctrl-C and SIGTERM are passed to every rank, which agree, write a checkpoint and end; after ``launch.grace_s`` they are killed.
    """
    early.disarm(outlived=launch.kind in _OUTLIVED)
    environ = dict(os.environ)
    environ[COMMAND_VARIABLE] = json.dumps(job.typed)
    if sys.stderr.isatty():
        environ[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
    if elastic and launch.kind not in _DRIVER_INSIDE:
        from horovod_jobs.launch.elastic import job as driver

        prepared = driver.plan(launch, job=job, host=this_host(), environ=environ)
        if not launch.dry_run:
            return driver.start(launch, prepared)
        print(shown(driver.shown_as(launch, prepared)))
        return 0
    if job.of_sweep and launch.kind == "slurm":
        _swept.append((launch, job))  # finish_sweep submits them together.
        return 0
    launcher = cast(Launcher, importlib.import_module(KINDS[launch.kind]))
    planned = launcher.plan_job(launch, job=job, host=this_host(), environ=environ)
    if launch.dry_run:
        print(shown(planned))
        return 0
    code = launcher.start(launch, planned)
    for count in range(1, launch.restarts + 1):
        if code in FINAL:
            break
        print(
            f"The world ended with exit code {code}; start {count} of launch.restarts={launch.restarts}.",
            file=sys.stderr,
        )
        code = launcher.start(launch, planned)
    return code


def finish_sweep() -> int:
    """Submit the jobs of a sweep that wait for each other: those that ask Slurm for the same as one array. Gives the exit code."""
    from horovod_jobs.launch.slurm import plan as slurm

    codes = []
    while _swept:
        launch = _swept[0][0]
        jobs = [job for other, job in _swept if other == launch]
        _swept[:] = [entry for entry in _swept if entry[0] != launch]
        planned = slurm.plan_jobs(launch, jobs=jobs, host=this_host(), environ=os.environ)
        if launch.dry_run:
            print(shown(planned))
        else:
            codes.append(slurm.start(launch, planned))
    return next((code for code in codes if code), 0)


def shown(planned: LaunchPlan) -> str:
    """A plan as text: its files, each under its name, and the command."""
    parts = [f"# {name}\n{text.rstrip()}\n" for name, text in planned.files.items()]
    return "\n".join([*parts, shlex.join(planned.argv)])
