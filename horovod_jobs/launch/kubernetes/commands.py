"""What ``horovod-runs`` says about jobs in a cluster: pods, logs, fetch, suspend, resume."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from horovod_jobs.errors import ConfigError
from horovod_jobs.launch.kubernetes import jobs
from horovod_jobs.launch.kubernetes.client import Cluster
from horovod_jobs.storage import write_text

Table = Callable[..., None]  # columns and rows to a terminal; ``right``: columns of numbers


def run(command: str, arguments: argparse.Namespace, *, table: Table) -> None:
    """Carry out one of the commands."""
    cluster = Cluster(context=arguments.context, namespace=arguments.namespace)
    commands: dict[str, Callable[[Cluster, argparse.Namespace, Table], None]] = {
        "pods": _pods,
        "logs": _logs,
        "fetch": _fetch,
        "suspend": _suspend,
        "resume": _suspend,
    }
    commands[command](cluster, arguments, table)


def _pods(cluster: Cluster, arguments: argparse.Namespace, table: Table) -> None:
    job = cluster.job(arguments.job)
    word, message = jobs.state(job)
    found = jobs.pods_of(cluster, arguments.job)
    if arguments.json:
        rows: list[dict[str, Any]] = [vars(pod) for pod in found]
        print(
            json.dumps(
                {"job": arguments.job, "kind": job.get("kind"), "state": word, "message": message, "pods": rows},
                indent=1,
            )
        )
        return
    print(f"{job.get('kind')} {arguments.job}  {word}{f'  {message}' if message else ''}")
    if not found:
        print("It has no pods now.")
        return
    shown = [
        [pod.name, pod.role, pod.phase, "yes" if pod.ready else "no", str(pod.restarts), pod.node, pod.note]
        for pod in found
    ]
    table(["pod", "role", "phase", "ready", "restarts", "node", "why"], shown, right=[4])


def _logs(cluster: Cluster, arguments: argparse.Namespace, table: Table) -> None:
    if arguments.pod is not None:
        lines = cluster.log(arguments.pod, follow=arguments.follow)
    else:
        pod = jobs.launcher(cluster, arguments.job)
        lines = jobs.log_lines(cluster, pod.name, following=arguments.follow)
    for line in lines:
        print(line, flush=True)


def _fetch(cluster: Cluster, arguments: argparse.Namespace, table: Table) -> None:
    manifest = jobs.fetch(cluster, arguments.job)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    if arguments.json:
        print(text)
        return
    run_id = str(manifest.get("run_id") or "")
    if not run_id or "/" in run_id or run_id.startswith("."):
        raise ConfigError(f"the manifest names the run {run_id!r}, which is no directory; print it with --json instead")
    path = Path(arguments.root) / run_id / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    print(f"{path}; horovod-runs show {run_id}")


def _suspend(cluster: Cluster, arguments: argparse.Namespace, table: Table) -> None:
    suspended = arguments.suspended
    kind = jobs.set_suspended(cluster, arguments.job, suspended=suspended)
    if arguments.json:
        print(json.dumps({"job": arguments.job, "kind": kind, "suspended": suspended}))
    elif suspended:
        print(
            f"{kind} {arguments.job} is suspended: its ranks write a checkpoint and its pods go; horovod-runs resume {arguments.job}"
        )
    else:
        print(f"{kind} {arguments.job} goes on from its last checkpoint; horovod-runs pods {arguments.job}")
