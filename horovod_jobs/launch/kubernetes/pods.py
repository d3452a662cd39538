"""The pods of a job in a cluster, as plain mappings: arguments, variables, volumes, containers.

Pure functions. What the image does with them is in launch/image/entrypoint.py.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from horovod_jobs.config import ElasticConfig, KubernetesConfig, LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.launch import mpi
from horovod_jobs.launch.kubernetes.manifests import JOB_LABEL, RESERVED, ROLE_LABEL, Manifest, quantity

HOME = "/home/jobs"  # of the image's user; relative paths of a job are below it
KEYS = f"{HOME}/.ssh"  # where the operator mounts the job's ssh keys
CONFIG = "/etc/horovod_jobs"
DATA = "/data"
SSH_PORT = 2222
USER = 1000
ENTRY_POINT = "horovod-jobs-entrypoint"
POD_VARIABLE = "HOROVOD_JOBS_POD"


def launcher_args(
    launch: LaunchConfig, *, run_id: str | None, elastic: bool = False, servers: bool = False
) -> list[str]:
    """What the entry point of a launcher is told: wait for the workers and start the ranks over them, or the driver that does.

    ``$(HOROVOD_JOBS_POD)`` is replaced by the kubelet: every attempt has a run directory of its own. ``servers``: a parameter
    server takes part.
    """
    chosen = [] if run_id else [f"run.id=$({POD_VARIABLE})"]
    job = ["horovod-jobs", f"--config-dir={CONFIG}", "--config-name=job", *chosen]
    if elastic:
        default = ElasticConfig()
        given = {entry.name: getattr(launch.elastic, entry.name) for entry in fields(ElasticConfig)}
        limits = {key: value for key, value in given.items() if value != getattr(default, key)}
        limits |= {
            "discovery": "mpi-operator",
            "slots": launch.kubernetes.slots,
            "max_np": launch.elastic.max_np or launch.np,
        }
        return ["launcher", *job, "launch=hosts", f"launch.np={launch.np}", f"launch.grace_s={launch.grace_s:g}",
                *(f"launch.elastic.{key}={value}" for key, value in limits.items())]  # fmt: skip
    settings = mpi.over_hosts(hosts=launch.np // launch.kubernetes.slots, servers=servers, own=launch.env)
    return ["launcher", "mpirun", "-np", str(launch.np), "--hostfile", "/etc/mpi/hostfile", "--bind-to", "none", "--map-by", "slot",
            # Without it Open MPI cuts host names at the first dot, and a pod does not resolve without its service.
            "--prtemca", "prte_keep_fqdn_hostnames", "1", *mpi.options(settings), *job]  # fmt: skip


def environment(launch: LaunchConfig, *, environ: Mapping[str, str]) -> list[Manifest]:
    """Variables of every pod: what ``launch.env`` names, as it is here, and what ``secret_env`` takes from secrets.

    Raises:
        ConfigError: a name is not set here, is the operator's own, or a secret is not written as SECRET/KEY.
    """
    config = launch.kubernetes
    if missing := [name for name in launch.env if name not in environ]:
        raise ConfigError(
            f"launch.env names {', '.join(missing)}, which is not set here; export it or take it off the list"
        )
    if taken := [name for name in (*launch.env, *config.secret_env) if name in RESERVED]:
        raise ConfigError(f"launch.env names {', '.join(taken)}, which the operator sets itself; take it off the list")
    threads = launch.threads or max(1, int(quantity(config.cpu, where="launch.kubernetes.cpu")) // config.slots)
    plain = {"OMP_NUM_THREADS": str(threads), "HOROVOD_JOBS_GRACE_S": f"{launch.grace_s:g}"}
    plain |= {name: environ[name] for name in launch.env}
    entries: list[Manifest] = [{"name": name, "value": value.replace("$(", "$$(")} for name, value in plain.items()]
    for name, source in config.secret_env.items():
        secret, _, key = source.partition("/")
        if not secret or not key:
            raise ConfigError(
                f"launch.kubernetes.secret_env.{name}={source} is not SECRET/KEY; name the secret and its key"
            )
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return entries


def launcher_environment(run: Mapping[str, Any], config: KubernetesConfig, *, elastic: bool = False) -> list[Manifest]:
    """Variables that the entry point of a launcher reads."""
    run_id = run.get("id") or f"$({POD_VARIABLE})"
    return [
        {"name": POD_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "HOROVOD_JOBS_RUN_DIR", "value": f"{os.path.normpath(os.path.join(HOME, run['root']))}/{run_id}"},
        {"name": "HOROVOD_JOBS_WAIT_S", "value": str(config.wait_s)},
        *([{"name": "HOROVOD_JOBS_ELASTIC", "value": "1"}] if elastic else []),
    ]


def worker_volumes(
    run: Mapping[str, Any], config: KubernetesConfig, *, name: str
) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes of a worker and where they are mounted.

    Raises:
        ConfigError: one claim for runs and artifacts, whose directories have no parent that could be mounted.
    """
    runs, store = (os.path.normpath(os.path.join(HOME, run[key])) for key in ("root", "store"))
    mounted: list[tuple[str, str, str | None]] = [
        ("runs", runs, config.runs_claim),
        ("artifacts", store, config.store_claim),
    ]
    if config.runs_claim is not None and config.runs_claim == config.store_claim:
        shared = os.path.commonpath([runs, store])
        if shared in ("/", HOME, runs, store):
            raise ConfigError(
                f"launch.kubernetes.runs_claim and store_claim are both {config.runs_claim}, which can be mounted once: "
                "use two claims, or a directory for both, such as run.root=/jobs/runs run.store=/jobs/artifacts"
            )
        mounted = [("jobs", shared, config.runs_claim)]
    empty = {"emptyDir": {"sizeLimit": config.volume_size}}
    volumes: list[Manifest] = [
        {"name": label, **({"persistentVolumeClaim": {"claimName": claim}} if claim else empty)}
        for label, _, claim in mounted
    ]
    mounts: list[Manifest] = [{"name": label, "mountPath": path} for label, path, _ in mounted]
    data: Manifest = (
        {"persistentVolumeClaim": {"claimName": config.data_claim, "readOnly": True}} if config.data_claim else empty
    )
    volumes += [
        {"name": "data", **data},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shm}},
        {"name": "config", "configMap": {"name": f"{name}-job"}},
    ]
    mounts += [
        {"name": "data", "mountPath": DATA, **({"readOnly": True} if config.data_claim else {})},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
    ]
    return volumes, mounts


def container(
    label: str,
    config: KubernetesConfig,
    *,
    args: Sequence[str],
    env: Sequence[Manifest],
    cpu: str,
    memory: str,
    gpus: int = 0,
) -> Manifest:
    """A container that may do nothing but run as an ordinary user. Cores are requested, memory and GPUs are limits too."""
    quantity(cpu, where="launch.kubernetes.cpu")
    quantity(memory, where="launch.kubernetes.memory")
    limits = {"memory": memory, **({config.gpu_resource: str(gpus)} if gpus else {})}
    return {
        "name": label,
        "image": config.image,
        "imagePullPolicy": config.pull_policy,
        "command": [ENTRY_POINT],
        "args": list(args),
        "env": list(env),
        "resources": {"requests": {"cpu": cpu, **limits}, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def worker_container(
    label: str, launch: LaunchConfig, *, env: Sequence[Manifest], mounts: Sequence[Manifest]
) -> Manifest:
    """A worker: sshd, ready when it answers."""
    config = launch.kubernetes
    made = container(label, config, args=["worker"], env=env, cpu=config.cpu, memory=config.memory, gpus=config.gpus)
    return {
        **made,
        "ports": [{"name": "ssh", "containerPort": SSH_PORT}],
        "readinessProbe": {"tcpSocket": {"port": SSH_PORT}, "initialDelaySeconds": 1, "periodSeconds": 2},
        "volumeMounts": list(mounts),
    }


def pod(
    role: str, launch: LaunchConfig, *, name: str, containers: Sequence[Manifest], volumes: Sequence[Manifest]
) -> Manifest:
    """A pod template of one of the two roles, as the restricted Pod Security Standard wants it."""
    config = launch.kubernetes
    optional: Manifest = {
        "imagePullSecrets": [{"name": secret} for secret in config.pull_secrets],
        "schedulerName": config.scheduler or ("volcano" if config.gang == "volcano" else None),
        "priorityClassName": config.priority_class,
        "serviceAccountName": config.service_account,
        "nodeSelector": dict(config.node_selector) if role == "worker" else {},
        "tolerations": list(config.tolerations) if role == "worker" else [],
        "volumes": list(volumes),
    }
    return {
        "metadata": {"labels": {JOB_LABEL: name, ROLE_LABEL: role}},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # The kubelet kills what is left after this time: a checkpoint must be written by then.
            "terminationGracePeriodSeconds": int(launch.grace_s) + 15,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": list(containers),
            **{key: value for key, value in optional.items() if value},
        },
    }
