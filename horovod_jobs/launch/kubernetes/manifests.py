"""What an MPIJob and a TrainJob have in common: names, checks, the job's config, the network policy, and the text of it all.

Pure functions: config in, mappings out. Sources: the Kubernetes API reference, and the operators' own schemas (docs/kubernetes.md).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from horovod_jobs.config import KubernetesConfig, LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.launch.base import JobCommand, trains_with

Manifest = dict[str, Any]

JOB_LABEL = "horovod-jobs/job"
ROLE_LABEL = "horovod-jobs/role"  # launcher or worker
_CONFIG_LIMIT_BYTES = 1_000_000  # Kubernetes takes 1 MiB with everything around it.
# The operators set these themselves; Trainer refuses a job that names one.
RESERVED = ("OMPI_MCA_orte_default_hostfile", "OMPI_MCA_orte_keep_fqdn_hostnames", "OMPI_MCA_orte_set_default_slots",
            "OMPI_MCA_plm_rsh_args")  # fmt: skip
_ELASTIC = "horovod_jobs.strategy.elastic.Elastic"
_LOGS = ("job_logging", "hydra_logging")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kKMGTPE]i?)?")


def job_name(config: KubernetesConfig, *, job: JobCommand) -> str:
    """The name in the cluster; pods, services and host names begin with it. Jobs of a sweep differ in its end.

    Raises:
        ConfigError: it is not a DNS label of at most 40 characters.
    """
    name = config.name or re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if job.of_sweep:
        name += "-" + hashlib.sha256(json.dumps(job.arguments).encode()).hexdigest()[:6]
    if not _NAME.fullmatch(name) or len(name) > 40:
        raise ConfigError(
            f"launch.kubernetes.name={name} is no name for a job in a cluster; use at most 40 of a-z, 0-9 and '-', a letter first"
        )
    return name


def is_elastic(config: Mapping[str, Any]) -> bool:
    """Whether a stage of the resolved config trains in a world that may change."""
    return trains_with(config, _ELASTIC)


def check(launch: LaunchConfig) -> None:
    """Values of the config that are words of Kubernetes.

    Raises:
        ConfigError: one that it does not know, or several workers without a place that they share.
    """
    config = launch.kubernetes
    for key, value, known in (
        ("pull_policy", config.pull_policy, ("Always", "IfNotPresent", "Never")),
        ("clean_pods", config.clean_pods, ("Running", "All", "None")),
        ("gang", config.gang or "coscheduling", ("coscheduling", "volcano")),
    ):
        if value not in known:
            raise ConfigError(f"launch.kubernetes.{key}={value} is not known; use {', '.join(known)}")
    for key in ("gpus", "backoff_limit", "wait_s", "gang_timeout_s"):
        if getattr(config, key) < 0:
            raise ConfigError(f"launch.kubernetes.{key}={getattr(config, key)} is negative; use 0 or more")
    if config.slots < 1:
        raise ConfigError(f"launch.kubernetes.slots={config.slots} is not a number of ranks; use 1 or more")
    missing = [key for key in ("runs_claim", "store_claim") if getattr(config, key) is None]
    if missing and (count := workers(launch)) > 1:
        raise ConfigError(
            f"launch.kubernetes.{missing[0]} is not set, and {count} workers must share runs and artifacts: name a ReadWriteMany "
            f"PersistentVolumeClaim, or use one worker (launch.kubernetes.slots={launch.np})"
        )


def workers(launch: LaunchConfig) -> int:
    """Worker pods that hold ``launch.np`` ranks.

    Raises:
        ConfigError: the ranks do not fill them.
    """
    slots = launch.kubernetes.slots
    if launch.np % slots:
        raise ConfigError(
            f"launch.np={launch.np} does not fill workers of launch.kubernetes.slots={slots} ranks; use a multiple of it"
        )
    return launch.np // slots


def quantity(text: str, *, where: str) -> float:
    """A Kubernetes quantity as a number: ``500m`` is 0.5.

    Raises:
        ConfigError: it is none.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ConfigError(f"{where}={text} is not a quantity; write 2 or 500m for cores, 4Gi for bytes")
    unit = found[2] or ""
    if unit == "m":
        return float(found[1]) / 1000
    power = " KMGTPE".index(unit[0].upper()) if unit else 0
    return float(found[1]) * float((1024 if unit.endswith("i") else 1000) ** power)


def config_map(name: str, *, job: JobCommand) -> Manifest:
    """The resolved config as a file that ``horovod-jobs --config-dir=... --config-name=job`` reads: it needs no other file.

    Raises:
        ConfigError: it is larger than Kubernetes takes.
    """
    root = {
        # As conf/config.yaml: the schema, and none of Hydra's own directories and logs.
        "defaults": ["job_schema", {"launch": "none"}, "_self_", *({f"override hydra/{log}": "none"} for log in _LOGS)],
        "hydra": {"output_subdir": None, "run": {"dir": "."}, "sweep": {"dir": ".", "subdir": "."}},
        **{key: value for key, value in job.config.items() if key != "launch"},
    }  # fmt: skip
    text = yaml.safe_dump(root, sort_keys=False, allow_unicode=True)
    if len(text.encode()) > _CONFIG_LIMIT_BYTES:
        raise ConfigError(
            f"the resolved config has {len(text.encode())} bytes and a ConfigMap takes {_CONFIG_LIMIT_BYTES}; "
            "put what is large into a file of the image or of a volume"
        )
    typed = json.dumps(list(job.typed), ensure_ascii=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-job", "labels": {JOB_LABEL: name}, "annotations": {"horovod-jobs/command": typed}},
        "data": {"job.yaml": text},
    }  # fmt: skip


def network_policy(name: str, config: KubernetesConfig) -> Manifest:
    """Only pods of this job may open a connection to them, and they reach each other and the name service alone."""
    mine = {"podSelector": {"matchLabels": {JOB_LABEL: name}}}
    names = {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}
    egress: list[Manifest] = [{}] if config.open_egress else [{"to": [mine]}, names]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{name}-pods", "labels": {JOB_LABEL: name}},
        "spec": {**mine, "policyTypes": ["Ingress", "Egress"], "ingress": [{"from": [mine]}], "egress": egress},
    }


def text(manifests: Sequence[Manifest], *, namespace: str | None) -> str:
    """The manifests as ``kubectl apply -f -`` takes them."""
    for manifest in manifests:
        if namespace:
            manifest["metadata"] = {**manifest["metadata"], "namespace": namespace}
    return "---\n".join(
        yaml.dump(manifest, Dumper=_Plain, sort_keys=False, allow_unicode=True) for manifest in manifests
    )


class _Plain(yaml.SafeDumper):
    """Writes several lines as a block, as a person would, and never a reference to an earlier place."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _block)
