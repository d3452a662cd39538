"""``launch=trainjob``: a TrainJob (trainer.kubeflow.org/v1alpha1) of Kubeflow Trainer v2 and the TrainingRuntime it refers to."""

from __future__ import annotations

from collections.abc import Mapping

from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan
from horovod_jobs.launch.kubernetes import manifests as k8s
from horovod_jobs.launch.kubernetes import pods

FILE = "trainjob.yaml"
_API = "trainer.kubeflow.org/v1alpha1"
_CONTAINER = "node"  # Trainer mounts keys and host file in containers of this name only.


def manifests(launch: LaunchConfig, *, job: JobCommand, environ: Mapping[str, str]) -> list[k8s.Manifest]:
    """The config, the network policy where one is wanted, the runtime and the TrainJob, in the order in which they are to be made.

    Raises:
        ConfigError: a value that Kubernetes or Trainer would refuse.
    """
    config = launch.kubernetes
    k8s.check(launch)
    name = k8s.job_name(config, job=job)
    env = pods.environment(launch, environ=environ)
    policy = [k8s.network_policy(name, config)] if config.network_policy else []
    runtime = training_runtime(launch, name=name, job=job, env=env)
    return [k8s.config_map(name, job=job), *policy, runtime, train_job(launch, name=name)]


def training_runtime(launch: LaunchConfig, *, name: str, job: JobCommand, env: list[k8s.Manifest]) -> k8s.Manifest:
    """What every node of the job is: an MPI runtime with a launcher beside the nodes."""
    config = launch.kubernetes
    run = job.config["run"]
    volumes, mounts = pods.worker_volumes(run, config, name=name)
    launcher = pods.container(
        _CONTAINER,
        config,
        args=pods.launcher_args(launch, run_id=run.get("id"), servers=job.has_servers),
        env=[*pods.launcher_environment(run, config), *env],
        cpu=config.launcher_cpu,
        memory=config.launcher_memory,
    )
    worker = pods.worker_container(_CONTAINER, launch, env=env, mounts=mounts)
    spec: k8s.Manifest = {
        "mlPolicy": {
            "numNodes": k8s.workers(launch),
            "mpi": {
                "mpiImplementation": "OpenMPI",
                "numProcPerNode": config.slots,
                "sshAuthMountPath": pods.KEYS,
                "runLauncherAsNode": False,
            },
        },
        "template": {
            "spec": {
                "network": {"publishNotReadyAddresses": True},
                "successPolicy": {"operator": "All", "targetReplicatedJobs": ["launcher"]},
                "failurePolicy": {"maxRestarts": config.backoff_limit},
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "spec": {
                                "template": _pod("worker", launch, name=name, container=worker, volumes=volumes),
                            }
                        },
                    },
                    {
                        "name": "launcher",
                        "dependsOn": [{"name": "node", "status": "Ready"}],
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {
                                # JobSet starts all nodes again when the launcher fails, and counts these restarts.
                                "backoffLimit": 0,
                                "template": _pod("launcher", launch, name=name, container=launcher, volumes=[]),
                            },
                        },
                    },
                ],
            }
        },
    }
    if config.gang:
        timeout = {"scheduleTimeoutSeconds": config.gang_timeout_s} if config.gang == "coscheduling" else {}
        spec["podGroupPolicy"] = {config.gang: timeout}
    return {
        "apiVersion": _API,
        "kind": "TrainingRuntime",
        "metadata": {"name": f"{name}-runtime", "labels": {k8s.JOB_LABEL: name}},
        "spec": spec,
    }


def _pod(
    role: str, launch: LaunchConfig, *, name: str, container: k8s.Manifest, volumes: list[k8s.Manifest]
) -> k8s.Manifest:
    made = pods.pod(role, launch, name=name, containers=[container], volumes=volumes)
    made["spec"]["restartPolicy"] = "OnFailure" if role == "worker" else "Never"
    return made


def train_job(launch: LaunchConfig, *, name: str) -> k8s.Manifest:
    """The TrainJob alone: which runtime, how many nodes, whether it may start."""
    config = launch.kubernetes
    queue = (
        {"scheduling.volcano.sh/queue-name": config.gang_queue}
        if config.gang == "volcano" and config.gang_queue
        else {}
    )
    spec: k8s.Manifest = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": f"{name}-runtime"},
        "suspend": config.suspend,
        "trainer": {"numNodes": k8s.workers(launch), "numProcPerNode": config.slots},
    }
    if config.deadline_s is not None:
        spec["activeDeadlineSeconds"] = config.deadline_s
    metadata: k8s.Manifest = {"name": name, "labels": {k8s.JOB_LABEL: name, **config.labels}}
    if queue:
        metadata["annotations"] = queue
    return {"apiVersion": _API, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
    """The manifests as a file; there is nothing to run on this machine."""
    if launch.controller == "gloo":
        raise ConfigError(
            "launch.controller=gloo cannot be used with launch=trainjob, whose ranks Open MPI starts; use auto"
        )
    made = manifests(launch, job=job, environ=environ)
    return LaunchPlan([], {}, "mpi", files={FILE: k8s.text(made, namespace=launch.kubernetes.namespace)})


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Give the manifests to the cluster; with ``launch.kubernetes.follow`` stay until the job has ended."""
    from horovod_jobs.launch.kubernetes.jobs import submit  # The kubernetes package is an extra.

    return submit(launch.kubernetes, planned.files[FILE])
