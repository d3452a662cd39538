"""``launch=mpijob``: an MPIJob (kubeflow.org/v2beta1) of Kubeflow's MPI operator."""

from __future__ import annotations

from collections.abc import Mapping

from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan
from horovod_jobs.launch.kubernetes import manifests as k8s
from horovod_jobs.launch.kubernetes import pods

FILE = "mpijob.yaml"


def manifests(launch: LaunchConfig, *, job: JobCommand, environ: Mapping[str, str]) -> list[k8s.Manifest]:
    """The config, the network policy where one is wanted, and the MPIJob, in the order in which they are to be made. Pure.

    Raises:
        ConfigError: a value that Kubernetes or the operator would refuse.
    """
    config = launch.kubernetes
    k8s.check(launch)
    name = k8s.job_name(config, job=job)
    env = pods.environment(launch, environ=environ)
    policy = [k8s.network_policy(name, config)] if config.network_policy else []
    made = mpi_job(launch, name=name, job=job, env=env)
    return [k8s.config_map(name, job=job), *policy, made]


def mpi_job(launch: LaunchConfig, *, name: str, job: JobCommand, env: list[k8s.Manifest]) -> k8s.Manifest:
    """The MPIJob alone. ``env``: variables of every pod.

    An elastic job's launcher runs the driver, which starts ranks by ssh on the workers that the operator names as they come and go.
    """
    config = launch.kubernetes
    run, elastic = job.config["run"], k8s.is_elastic(job.config)
    count = k8s.workers(launch)
    volumes, mounts = pods.worker_volumes(run, config, name=name)
    launcher = pods.container(
        "launcher",
        config,
        args=pods.launcher_args(launch, run_id=run.get("id"), elastic=elastic, servers=job.has_servers),
        env=[*pods.launcher_environment(run, config, elastic=elastic), *env],
        cpu=config.launcher_cpu,
        memory=config.launcher_memory,
    )
    if elastic:  # The driver writes elastic.jsonl beside the run, and reads the config.
        launcher["volumeMounts"] = mounts
    worker = pods.worker_container("worker", launch, env=env, mounts=mounts)
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": name, "labels": {k8s.JOB_LABEL: name, **config.labels}},
        "spec": {
            "slotsPerWorker": config.slots,
            "sshAuthMountPath": pods.KEYS,
            "mpiImplementation": "OpenMPI",
            "launcherCreationPolicy": "WaitForWorkersReady",
            "runPolicy": _run_policy(launch, size=count + 1),
            "mpiReplicaSpecs": {
                # A new pod for each attempt: backoffLimit counts them, and each has a log of its own.
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "Never",
                    "template": pods.pod(
                        "launcher", launch, name=name, containers=[launcher], volumes=volumes if elastic else []
                    ),
                },
                # The operator never replaces a pod that has failed; a container that ended is started again in its pod.
                "Worker": {
                    "replicas": count,
                    "restartPolicy": "OnFailure",
                    "template": pods.pod("worker", launch, name=name, containers=[worker], volumes=volumes),
                },
            },
        },
    }


def _run_policy(launch: LaunchConfig, *, size: int) -> k8s.Manifest:
    config = launch.kubernetes
    policy: k8s.Manifest = {
        "cleanPodPolicy": config.clean_pods,
        "backoffLimit": config.backoff_limit,
        "suspend": config.suspend,
    }
    if config.deadline_s is not None:
        policy["activeDeadlineSeconds"] = config.deadline_s
    if config.ttl_s is not None:
        policy["ttlSecondsAfterFinished"] = config.ttl_s
    if config.gang:
        policy["schedulingPolicy"] = {"minAvailable": size, "scheduleTimeoutSeconds": config.gang_timeout_s}
        if config.gang == "volcano" and config.gang_queue:
            policy["schedulingPolicy"]["queue"] = config.gang_queue
        if config.priority_class:
            policy["schedulingPolicy"]["priorityClass"] = config.priority_class
    return policy


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
    """The manifests as a file; there is nothing to run on this machine."""
    if launch.controller == "gloo":
        raise ConfigError(
            "launch.controller=gloo cannot be used with launch=mpijob, whose ranks Open MPI starts; use auto"
        )
    made = manifests(launch, job=job, environ=environ)
    return LaunchPlan([], {}, "mpi", files={FILE: k8s.text(made, namespace=launch.kubernetes.namespace)})


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Give the manifests to the cluster; with ``launch.kubernetes.follow`` stay until the job has ended."""
    from horovod_jobs.launch.kubernetes.jobs import submit  # The kubernetes package is an extra.

    return submit(launch.kubernetes, planned.files[FILE])
