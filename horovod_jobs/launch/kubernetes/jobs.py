"""Jobs in a cluster: submit one, show its pods, follow it, fetch its manifest, suspend and resume it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from horovod_jobs.config import KubernetesConfig
from horovod_jobs.errors import ArtifactError, ConfigError, JobError
from horovod_jobs.launch.kubernetes.client import JOB_KINDS, Cluster
from horovod_jobs.launch.kubernetes.log import is_part, manifest_in
from horovod_jobs.launch.kubernetes.manifests import JOB_LABEL, ROLE_LABEL, Manifest

_POLL_S = 2.0


@dataclass(frozen=True)
class Pod:
    """What is shown of a pod."""

    name: str
    role: str
    phase: str
    ready: bool
    restarts: int
    node: str
    note: str  # why it waits or how it ended, in Kubernetes' words
    exit_code: int | None


def read_pod(manifest: Manifest) -> Pod:
    """A pod as the cluster describes it."""
    status = manifest.get("status") or {}
    containers = status.get("containerStatuses") or [{}]
    state = containers[0].get("state") or {}
    ended = state.get("terminated") or {}
    waiting = state.get("waiting") or (containers[0].get("lastState") or {}).get("terminated") or {}
    unscheduled: Manifest = next(
        (entry for entry in status.get("conditions") or [] if entry.get("status") == "False" and entry.get("message")),
        {},
    )
    shown = ended or waiting or status or {}
    reason, message = (shown.get(key) or unscheduled.get(key) or "" for key in ("reason", "message"))
    note = ": ".join(part for part in (reason, " ".join(str(message).split())) if part)
    if ended:
        note = f"exit code {ended.get('exitCode')}" + (f", {note}" if note else "")
    return Pod(
        name=manifest["metadata"]["name"],
        role=manifest["metadata"].get("labels", {}).get(ROLE_LABEL, ""),
        phase=str(status.get("phase", "Unknown")),
        ready=bool(containers[0].get("ready")),
        restarts=int(containers[0].get("restartCount") or 0),
        node=str((manifest.get("spec") or {}).get("nodeName") or ""),
        note=note if status.get("phase") != "Running" or not containers[0].get("ready") else "",
        exit_code=ended.get("exitCode"),
    )  # fmt: skip


def state(job: Manifest) -> tuple[str, str]:
    """What the operator says of a job, in a word, and its message."""
    true = [entry for entry in (job.get("status") or {}).get("conditions") or [] if entry.get("status") == "True"]
    for word in ("Failed", "Succeeded", "Complete", "Suspended", "Running", "Created"):
        for entry in true:
            if entry.get("type") == word:
                return "Succeeded" if word == "Complete" else word, str(entry.get("message") or "")
    return "Created", ""


def submit(config: KubernetesConfig, text: str, *, cluster: Cluster | None = None) -> int:
    """Give a job's manifests to the cluster, whole or not at all; with ``follow`` stay until it has ended. Gives an exit code.

    Raises:
        ConfigError: the cluster refuses one of them.
        SetupError: the cluster does not answer, or lacks the operator.
    """
    cluster = cluster or Cluster(context=config.context, namespace=config.namespace)
    *others, job = yaml.safe_load_all(text)
    made: list[Manifest] = []
    try:
        for manifest in others:
            cluster.create(manifest)
            made.append(manifest)
        uid = cluster.create(job)["metadata"]["uid"]
    except JobError:
        for manifest in reversed(made):
            cluster.delete(manifest["kind"], manifest["metadata"]["name"])
        raise
    name = job["metadata"]["name"]
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": uid}
    for manifest in made:  # They go when the job goes.
        cluster.patch(manifest["kind"], manifest["metadata"]["name"], {"metadata": {"ownerReferences": [owner]}})
    where = f"{name} --namespace {cluster.namespace}" + (f" --context {config.context}" if config.context else "")
    print(
        f"submitted {job['kind']} {name}; see horovod-runs pods {where}, or horovod-runs logs --follow {where}",
        flush=True,
    )
    return follow(cluster, name) if config.follow else 0


def pods_of(cluster: Cluster, name: str, *, role: str | None = None) -> list[Pod]:
    """The job's pods, the oldest first."""
    selector = f"{JOB_LABEL}={name}" + (f",{ROLE_LABEL}={role}" if role else "")
    return [read_pod(manifest) for manifest in cluster.pods(selector)]


def launcher(cluster: Cluster, name: str) -> Pod:
    """The pod of the latest attempt.

    Raises:
        ConfigError: there is none yet, or there is no such job.
    """
    found = pods_of(cluster, name, role="launcher")
    if not found:
        word, message = state(cluster.job(name))
        raise ConfigError(
            f"the job {name} has no launcher now: it is {word}{f' ({message})' if message else ''}; see horovod-runs pods {name}"
        )
    return found[-1]


def log_lines(cluster: Cluster, pod: str, *, following: bool) -> Iterator[str]:
    """A launcher's log without the manifest in it, which is for programs."""
    return (line for line in cluster.log(pod, follow=following) if not is_part(line))


def follow(
    cluster: Cluster, name: str, *, show: Callable[[str], Any] = print, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Show the launcher's output, of every attempt, until the job has ended. Gives the job's exit code."""
    seen: set[str] = set()
    told = ""
    while True:
        for pod in pods_of(cluster, name, role="launcher"):
            if pod.name not in seen and pod.phase not in ("Pending", "Unknown"):
                seen.add(pod.name)
                for line in log_lines(cluster, pod.name, following=True):
                    show(line)
        word, message = state(cluster.job(name))
        if word in ("Failed", "Succeeded"):
            codes = [pod.exit_code for pod in pods_of(cluster, name, role="launcher") if pod.exit_code is not None]
            if word == "Failed":
                print(
                    f"error: the job {name} failed{f': {message}' if message else ''}; horovod-runs pods {name} shows its pods",
                    file=sys.stderr,
                )
            return 0 if word == "Succeeded" else ((codes[-1] if codes else 1) or 1)
        if not seen and word != told:
            told = word
            show(f"the job {name} is {word}{f' ({message})' if message else ''}; waiting for its launcher")
        sleep(_POLL_S)


def fetch(cluster: Cluster, name: str) -> dict[str, Any]:
    """The manifest of the job's run, out of the launcher's log.

    Raises:
        ArtifactError: the log has none: the job has not ended, or was cut off.
    """
    pod = launcher(cluster, name)
    found = manifest_in(cluster.log(pod.name))
    if found is None:
        word, _ = state(cluster.job(name))
        raise ArtifactError(
            f"the log of {pod.name} has no manifest (the job is {word}); it is printed when the launcher ends: try again then, "
            "or read manifest.json on the volume of the runs"
        )
    return found


def set_suspended(cluster: Cluster, name: str, *, suspended: bool) -> str:
    """Suspend or resume a job. The operator ends the pods of a suspended one: their ranks write a checkpoint first. Gives its kind."""
    job = cluster.job(name)
    kind = str(job.get("kind") or "MPIJob")
    change: Any = suspended
    for key in reversed(JOB_KINDS[kind].suspend):
        change = {key: change}
    cluster.patch(kind, name, {"spec": change})
    return kind
