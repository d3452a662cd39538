"""The typed schema of a job. A default lives here and nowhere else; conf/ only chooses between parts.

Nodes with a ``_target_`` (model, data, optimizer, ...) are free mappings here and are checked against the signature of what
they name before anything runs (``instantiate.bind``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from omegaconf import MISSING


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
    log_every_steps: int = 50  # scalars for the tracker and, without a terminal, lines on the console


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

    INPUTS: ClassVar[dict[str, tuple[str, ...]]] = {"model": ("model", "quantized")}
    OUTPUT: ClassVar[str] = "evaluation"

    kind: str = "evaluate"
    task: Any = "${task}"
    split: str = "test"  # test, validation or train
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
    title: str = "${name}"


STAGES: dict[str, type[StageConfig]] = {
    "train": TrainStage,
    "distill": DistillStage,
    "quantize": QuantizeStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
    "report": ReportStage,
}


@dataclass
class LaunchConfig:
    """How the job's world is started. ``none``: run in the world this process is already in."""

    kind: str = "none"  # none or local
    np: int = 1  # ranks
    controller: str = "auto"  # auto (MPI where it is installed), mpi or gloo
    threads: int | None = None  # torch threads a rank; null: cores / ranks
    env: list[str] = field(default_factory=list)  # names of further environment variables the ranks get
    grace_s: float = 60.0  # time for a checkpoint after Ctrl-C or SIGTERM before ranks are killed
    dry_run: bool = False  # print the command and stop


@dataclass
class RunConfig:
    """Where things are written and what is shown."""

    root: str = "runs"  # a directory a run
    store: str = "artifacts"  # the artifact store, shared by runs
    id: str | None = None  # null: date, time and a random part
    log_level: str = "info"  # debug, info, warning or error
    progress: str = "auto"  # auto (bars on a terminal, lines elsewhere), bars, lines or none
    parallel_stages: int = 1  # stages that do not need each other and run at the same time, each on a part of the ranks


@dataclass
class JobConfig:
    """The whole job."""

    name: str = "job"
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
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: dict[str, Any] = field(default_factory=dict)
