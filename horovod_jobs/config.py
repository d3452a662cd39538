"""The typed schema of a job. A default lives here and nowhere else; conf/ only chooses between parts.

Nodes with a ``_target_`` (model, data, optimizer, ...) are free mappings here and are checked against the signature of what
they name before anything runs (``instantiate.bind``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from omegaconf import MISSING

Texts = list[str]  # For a field that is itself named list.


@dataclass
class FitConfig:
    """The fit loop. A stage's own ``fit`` takes what it does not say from the job's ``fit``."""

    epochs: int = 10
    max_steps: int | None = None  # stop after so many updates, whatever the epochs say
    global_batch: int = 128  # samples an update, over all ranks and accumulation steps
    batch_per_rank: int | None = None  # instead of global_batch: samples a rank and accumulation step
    accumulate: int = 1  # backward passes an update
    drop_last: bool = False  # leave out an epoch's last partial batch instead of weighting it
    workers: int = 0  # loader processes a rank, for data sets that are not in memory
    lr_reference_batch: int | None = None  # the batch optimizer.lr is meant for; scaled linearly (Goyal et al. 2017)
    clip_norm: float | None = None  # largest global L2 norm of the gradient
    precision: str = "fp32"  # fp32, bf16 or fp16 (autocast; fp16 also scales the loss)
    channels_last: bool = False  # memory layout of images and convolutions
    compile: bool = False  # torch.compile the forward pass
    device: str = "auto"  # auto, cpu or cuda
    sync_batchnorm: bool = True  # batch statistics over all ranks, so that the world size does not change the result
    ema_decay: float | None = None  # exponential moving average of the weights, used for validation and published
    publish: str = "last"  # which weights become the artifact: last, or best on the validation split
    validate_every_epochs: int = 1  # 0: only after the last epoch
    early_stop_epochs: int | None = None  # stop when the validation metric has not improved for so many epochs
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = 60.0
    checkpoint_keep: int = 2  # the last so many, and the best
    log_every_steps: int = 50  # of the loss and the learning rate, for the tracker


def effective_global_batch(fit: FitConfig, *, world_size: int) -> int:
    """Samples an update over all ranks: ``global_batch``, or what ``batch_per_rank`` comes to in this world."""
    if fit.batch_per_rank is not None:
        return fit.batch_per_rank * fit.accumulate * world_size
    return fit.global_batch


def _inherited_fit() -> FitConfig:
    """Every field refers to the job's ``fit``; OmegaConf resolves it."""
    return FitConfig(**{entry.name: f"${{fit.{entry.name}}}" for entry in fields(FitConfig)})  # type: ignore[arg-type]


@dataclass
class StageConfig:
    """What every stage has. ``needs`` maps a role to the name of the stage that fills it."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {}  # role -> kinds of artifact it accepts
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()  # roles that may be left out
    FREE_ROLES: ClassVar[tuple[str, ...]] = ()  # kinds accepted under any other role; empty: no other role
    OUTPUT: ClassVar[str] = ""  # kind of the artifact it makes
    USES_DATA: ClassVar[bool] = True  # the data set's digest is part of the fingerprint
    REUSE: ClassVar[bool] = True  # an artifact with the same fingerprint is taken instead of running

    kind: str = MISSING
    enabled: bool = True
    force: bool = False  # run even if the artifact is there
    needs: dict[str, str] = field(default_factory=dict)
    seed: int = "${seed}"  # type: ignore[assignment]


@dataclass
class TrainStage(StageConfig):
    """Train a model on hard labels. ``needs.init`` gives the weights to start from."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"init": ("model",)}
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"init"})
    OUTPUT: ClassVar[str] = "model"

    kind: str = "train"
    model: Any = "${model}"
    task: Any = "${task}"
    loss: Any = None  # a node called as loss(outputs, batch) -> per-sample losses [B]; null: the task's own
    optimizer: Any = "${optimizer}"
    schedule: Any = "${schedule}"
    strategy: Any = "${strategy}"
    augment: bool = True  # use the data set's augmentation
    fit: FitConfig = field(default_factory=_inherited_fit)


@dataclass
class DistillStage(TrainStage):
    """Train a student under a frozen teacher."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"teacher": ("model",), "init": ("model",)}

    kind: str = "distill"
    model: Any = "${student}"
    distiller: Any = "${distiller}"


@dataclass
class QuantizeStage(StageConfig):
    """Turn a model into an integer one and hold it against the original."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"model": ("model",)}
    OUTPUT: ClassVar[str] = "quantized"

    kind: str = "quantize"
    quantizer: Any = "${quantizer}"
    task: Any = "${task}"
    calibration_samples: int = 1024  # of the training split, chosen by the seed
    calibration_batch: int = 64
    max_drop: float | None = (
        0.5  # largest loss of accuracy on the validation split, in percentage points; null: no gate
    )
    check_samples: int | None = None  # validation samples used for that; null: all


@dataclass
class EvaluateStage(StageConfig):
    """Measure any model artifact: quality, latency, size, memory."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"model": ("model", "quantized", "export")}
    OUTPUT: ClassVar[str] = "evaluation"

    kind: str = "evaluate"
    task: Any = "${task}"
    split: str = "test"  # test, validation or train
    format: str | None = None  # torch or onnx, where an export holds both; null: the model's own
    batch: int = 250
    latency_batches: list[int] = field(default_factory=lambda: [1, 64])
    latency_runs: int = 50
    latency_threads: int = 1


@dataclass
class ExportStage(StageConfig):
    """A bundle that other programs load: safetensors and ONNX, checked against the model."""

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"model": ("model", "quantized")}
    OUTPUT: ClassVar[str] = "export"

    kind: str = "export"
    onnx: bool = True
    tolerance: float = 1e-4  # largest absolute difference of ONNX's outputs from torch's


@dataclass
class ReportStage(StageConfig):
    """One HTML file and a model card about the stages it needs. It is made anew in every run."""

    FREE_ROLES: ClassVar[tuple[str, ...]] = ("model", "quantized", "evaluation", "export")
    OUTPUT: ClassVar[str] = "report"
    USES_DATA: ClassVar[bool] = False
    REUSE: ClassVar[bool] = False

    kind: str = "report"
    title: str = "${title}"
    license: str = "unknown"  # of the model, for its card; one of the hub's ids, such as apache-2.0


STAGES: dict[str, type[StageConfig]] = {
    "train": TrainStage,
    "distill": DistillStage,
    "quantize": QuantizeStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
    "report": ReportStage,
}


@dataclass
class HostsConfig:
    """``launch=hosts``: a world over hosts that are reached by ssh."""

    list: Texts = field(default_factory=list)  # HOST:SLOTS, HOST for one slot
    file: str | None = None  # instead: a host file, lines of "HOST slots=4" or "HOST:4"
    interface: str | None = None  # network interface between the hosts; null: the one that leads to the other hosts
    check_host_keys: bool = True  # false: take any key that a host shows
    connect_timeout_s: int = 10  # for the first answer of a host
    keepalive_s: int = 15  # a host that is silent for three times as long is lost
    clock_limit_s: float = 5.0  # largest difference between the hosts' clocks
    disk_free_mb: int = 1000  # free space that each host needs where artifacts go


@dataclass
class SlurmConfig:
    """``launch=slurm``: a batch job that asks for ranks, and requeues itself until the work is done."""

    mpi: str = "pmix"  # pmix: srun --mpi=pmix starts the ranks; mpirun: Open MPI does, over the nodes of the job
    nodes: int | None = None  # null: as Slurm sees fit
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gpus_per_task: int | None = None
    mem: str | None = None  # memory a node: 16G
    time: str | None = None  # limit of one attempt, as Slurm writes it: 30, 4:00:00, 1-12:00:00
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    extra: list[str] = field(default_factory=list)  # further options of sbatch: "--exclusive"
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks: "module load cuda"
    warn_s: int = 120  # before the time limit the ranks are told to write a checkpoint
    requeues: int = 100  # how often the job may go back into the queue; 0: never
    at_once: int = 1  # of a sweep's jobs, so many run at the same time
    logs: str = "slurm"  # directory of the batch scripts and of what the jobs print
    wait: bool = False  # wait for the end of the job and take its exit code


@dataclass
class DockerConfig:
    """``launch=docker``: the job's world in one container on this machine."""

    image: str = "horovod-jobs"
    engine: str = "docker"  # docker or podman, or the path of either
    data: str | None = None  # directory of data sets, read only at /data; null: $HOROVOD_JOBS_DATA where that is set
    user: str | None = None  # UID:GID that files belong to; null: yours
    gpus: str | None = None  # all, a number, or device=0,1; null: none
    cpus: float | None = None  # null: all
    memory: str | None = None  # 8g; null: no limit
    shm_size: str = "1g"  # shared memory, which ranks on one machine exchange gradients through
    network: str | None = None  # null: the engine's own; none: no network at all


@dataclass
class KubernetesConfig:
    """``launch=mpijob`` and ``launch=trainjob``: the job's world in pods of a cluster."""

    name: str | None = None  # of the job in the cluster; null: the job's own, in lower case
    namespace: str | None = None  # null: the one of the context
    context: str | None = None  # of ~/.kube/config; null: the current one, or the pod's own service account
    image: str = "horovod-jobs"
    pull_policy: str = "IfNotPresent"  # Always, IfNotPresent or Never
    pull_secrets: list[str] = field(default_factory=list)
    slots: int = 1  # ranks a worker pod
    cpu: str = "2"  # a worker: 2, or 500m
    memory: str = "4Gi"  # a worker, requested and the limit
    gpus: int = 0  # a worker
    gpu_resource: str = "nvidia.com/gpu"
    shm: str = "1Gi"  # a worker's shared memory; it counts as memory
    launcher_cpu: str = "500m"
    launcher_memory: str = "1Gi"
    runs_claim: str | None = None  # PersistentVolumeClaim for run.root; null: an emptyDir, which goes with the pod
    store_claim: str | None = None  # the same for run.store
    data_claim: str | None = None  # data sets, read only at /data; null: an emptyDir
    volume_size: str = "10Gi"  # limit of each emptyDir
    secret_env: dict[str, str] = field(default_factory=dict)  # variable -> SECRET/KEY
    labels: dict[str, str] = field(default_factory=dict)  # of the job: a queue of Kueue, say
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: Any = field(default_factory=lambda: [])  # as Kubernetes writes them
    service_account: str | None = None
    priority_class: str | None = None
    scheduler: str | None = None  # null: the cluster's own, and Volcano's for gang=volcano
    gang: str | None = None  # all pods or none, by what the cluster has for it: coscheduling or volcano
    gang_queue: str | None = None  # of Volcano
    gang_timeout_s: int = 600
    clean_pods: str = "Running"  # when the job has ended: Running pods are deleted, All or None
    backoff_limit: int = 3  # how often the launcher is started again; the job then goes on from its last checkpoint
    deadline_s: int | None = None  # end the job after so long
    ttl_s: int | None = None  # delete the job so long after its end; null: keep it
    wait_s: int = 600  # how long the launcher waits for its workers
    suspend: bool = False  # submit it without starting it
    network_policy: bool = True  # only the job's pods reach each other
    open_egress: bool = False  # with the policy: the pods may reach addresses outside (a data set, a tracking server)
    follow: bool = False  # show the launcher's output until the job has ended, and take its exit code


@dataclass
class ElasticConfig:
    """``strategy=elastic``: how the world of ranks grows, shrinks and recovers while the job runs (launch=local or hosts)."""

    min_np: int = 1  # with fewer ranks the job waits, and ends after start_s
    max_np: int | None = None  # null: launch.np without discovery, else all that discovery gives
    discovery: str | None = (
        None  # a program or a file that tells HOST:SLOTS a line, slurm, or mpi-operator; null: the launcher's hosts
    )
    discovery_every_s: float = 2.0  # between two looks at it
    slots: int = 1  # of a host that discovery names without a number
    start_s: float = 120.0  # for a new rank to report, and for enough ranks to be there
    wait_s: float = 0.0  # how long the ranks that are left wait for a replacement before they go on without
    beat_s: float = 0.5  # between two signs of life of a rank
    lease_s: float = 15.0  # a rank whose signs of life do not arrive for so long ends itself, and is taken for dead
    return_s: float = 90.0  # after a loss, for the other ranks to come back; then they are killed and replaced
    gloo_timeout_s: int = 30  # of Horovod's own connections: how long a rank waits for one that is cut off
    cooldown_s: float = 5.0  # before a slot whose rank was lost gets a new one; doubles with each loss, up to 16 times
    reset_limit: int = 10  # losses after which the job gives up


@dataclass
class LaunchConfig:
    """How the job's world is started. ``none``: run in the world this process is already in."""

    kind: str = "none"  # none, local, hosts or slurm
    np: int = 1  # ranks; 0 with launch=hosts: every slot, with launch=slurm: nodes x ntasks_per_node
    controller: str = "auto"  # auto (MPI where it is installed), mpi or gloo
    threads: int | None = None  # torch threads a rank; null: cores / ranks
    env: list[str] = field(default_factory=list)  # names of further environment variables the ranks get
    grace_s: float = 60.0  # time for a checkpoint after Ctrl-C or SIGTERM before ranks are killed
    restarts: int = 0  # start the world again so often where it ended by a fault (a rank lost, killed or crashed)
    dry_run: bool = False  # print the command and stop
    hosts: HostsConfig = field(default_factory=HostsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    docker: DockerConfig = field(default_factory=DockerConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


@dataclass
class RunConfig:
    """Where things are written and what is shown."""

    root: str = "runs"  # a directory a run
    store: str = "artifacts"  # the artifact store, shared by runs
    id: str | None = None  # null: date, time and a random part
    log_level: str = "info"  # debug, info, warning or error
    progress: str = (
        "auto"  # auto (bars on a terminal, lines elsewhere), bars, lines, json (a line of JSON each) or none
    )
    silent_limit_s: float | None = (
        120.0  # a rank that the others wait for and that gives no sign of life for so long ends the job
    )
    stall_limit_s: float | None = 1800.0  # the same for ranks that do give signs of life and do not come
    parallel_stages: int = 1  # stages that do not need each other and run at the same time, each on a part of the ranks


@dataclass
class JobConfig:
    """The whole job."""

    name: str = "job"
    title: str = "${name}"  # what people read: the heading of the report
    seed: int = 0
    plan: bool = False  # print what would run and stop
    allow_targets: list[str] = field(default_factory=list)  # modules of yours whose classes a _target_ may name
    model: Any = None
    student: Any = None
    data: Any = None
    task: Any = None
    optimizer: Any = None
    schedule: Any = None
    distiller: Any = None
    quantizer: Any = None
    strategy: Any = None
    fit: FitConfig = field(default_factory=FitConfig)
    footprint: Any = None
    tracker: Any = None
    chaos: Any = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: dict[str, Any] = field(default_factory=dict)
