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

from horovod_jobs.config import LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, this_host
from horovod_jobs.launch.in_rank import COMMAND_VARIABLE

KINDS = {"local": "horovod_jobs.launch.local"}


class Launcher(Protocol):
    """What the module of a kind has."""

    def plan_job(self, launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
        """What to run and with which files. Pure: it looks at its arguments only."""

    def start(self, launch: LaunchConfig, planned: LaunchPlan) -> int:
        """Run the plan; gives the job's exit code."""


def start(launch: LaunchConfig, *, job: JobCommand) -> int:
    """Run the job in a world of its own and wait for it. Gives the job's exit code.

    Ctrl-C and SIGTERM are passed to every rank, which agree, write a checkpoint and end; after ``launch.grace_s`` they are killed.
    """
    launcher = cast(Launcher, importlib.import_module(KINDS[launch.kind]))
    environ = dict(os.environ)
    environ[COMMAND_VARIABLE] = json.dumps(job.typed)
    if sys.stderr.isatty():
        environ[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
    planned = launcher.plan_job(launch, job=job, host=this_host(), environ=environ)
    if launch.dry_run:
        print(shown(planned))
        return 0
    return launcher.start(launch, planned)


def shown(planned: LaunchPlan) -> str:
    """A plan as text: its files, each under its name, and the command."""
    parts = [f"# {name}\n{text.rstrip()}\n" for name, text in planned.files.items()]
    return "\n".join([*parts, shlex.join(planned.argv)])
