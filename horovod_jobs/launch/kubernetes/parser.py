"""The commands of ``horovod-runs`` about a job in a Kubernetes cluster; what they do is imported when one is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial


def add_cluster_commands(add_parser: Callable[..., argparse.ArgumentParser], *, table: Callable[..., None]) -> None:
    """Add them to a parser's sub-commands. ``table`` prints columns and rows."""

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("job", metavar="JOB", help="name of the MPIJob or TrainJob")
        sub.add_argument("--namespace", metavar="NAME", help="default: the context's own")
        sub.add_argument("--context", metavar="NAME", help="of kubectl's configuration (default: the current one)")
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.set_defaults(run_command=partial(_run, name, table))
        return sub

    add("pods", "show the pods of a job in a Kubernetes cluster, and why those that do not run do not")
    logs = add("logs", "show the output of a job in a cluster")
    logs.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    logs.add_argument("--pod", metavar="POD", help="of this pod (default: the latest launcher)")
    fetch = add("fetch", "get the manifest of a job in a cluster that has ended, for show and compare")
    fetch.add_argument("--root", default="runs", metavar="DIR", help="directory of the runs (default: %(default)s)")
    add("suspend", "suspend a job in a cluster: its ranks write a checkpoint, its pods go").set_defaults(suspended=True)
    add("resume", "resume a suspended job, or start one that was submitted suspended").set_defaults(suspended=False)


def _run(command: str, table: Callable[..., None], arguments: argparse.Namespace) -> None:
    from horovod_jobs.launch.kubernetes.commands import run

    run(command, arguments, table=table)
