"""What a run would do: load the data, check every part against its signature, fingerprint every stage, look into the store."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from horovod_jobs.artifacts import Artifact, ArtifactStore, open_artifact
from horovod_jobs.bundle import read_config
from horovod_jobs.comm.world import World
from horovod_jobs.config import (
    DistillStage,
    EvaluateStage,
    FitConfig,
    QuantizeStage,
    TrainStage,
    effective_global_batch,
)
from horovod_jobs.errors import ArtifactError, ConfigError, DataError
from horovod_jobs.footprint import Meter, NullMeter
from horovod_jobs.graph import Node, build, check_external, fingerprint, is_external
from horovod_jobs.instantiate import accepted, code_digests, instantiate, is_node, locate
from horovod_jobs.job import Job
from horovod_jobs.latency import cpu_name
from horovod_jobs.runtimes import FORMATS
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.tracking import NullTracker, Tracker
from horovod_jobs.turns import in_turns, keys_of, strategy_counts_ranks, whole_because

if TYPE_CHECKING:
    from horovod_jobs.data.base import DataModule

RunStage = Callable[[StageContext, Any], StageResult]


@dataclass(frozen=True)
class Prepared:
    """The parts that every stage shares, built and checked."""

    job: Job
    nodes: list[Node]
    data: DataModule
    meter: Meter
    tracker: Tracker
    externals: dict[str, Artifact]  # artifacts that a need names by path

    def run_of(self, node: Node) -> RunStage:
        """The function that runs a stage of this kind."""
        return importlib.import_module(f"horovod_jobs.stages.{node.config.kind}").run  # type: ignore[no-any-return]

    def task_of(self, node: Node) -> Any:
        """The stage's task, or the job's where the kind has none of its own."""
        chosen = getattr(node.config, "task", None) or self.job.config.task
        return _task(chosen, self)


def _task(chosen: Any, prepared: Prepared) -> Any:
    allow = prepared.job.config.allow_targets
    if not is_node(chosen):
        raise ConfigError(f"task={chosen} names nothing to build; choose one (task=classification)")
    offered = accepted(chosen, {"num_classes": prepared.data.num_classes}, allow=allow)
    return instantiate(chosen, allow=allow, where="task", **offered)


@dataclass(frozen=True)
class Planned:
    """What a run does about one stage: run, reuse or skip it, and why; in which turn, and beside which others.

    ``whole`` says why it wants the whole world, or is None; ``keys`` is what it makes, which no other stage may make beside it.
    """

    node: Node
    action: str
    why: str
    fingerprint: str = ""
    artifact: Artifact | None = None
    whole: str | None = None
    keys: frozenset[str] = frozenset()
    turn: int = 0


def prepare(job: Job, world: World) -> Prepared:
    """Collective. Build the shared parts and check every stage; nothing has run yet.

    Raises:
        ConfigError, DataError, ArtifactError: what does not fit, agreed by all ranks.
    """
    from horovod_jobs.data.base import as_data_module

    config = job.config
    allow = config.allow_targets
    with world.agreed("prepare"):
        nodes = build(job.stages)
        tracker = instantiate(config.tracker, allow=allow, where="tracker") if config.tracker else NullTracker()
        meter = instantiate(config.footprint, allow=allow, where="footprint") if config.footprint else NullMeter()
        check = getattr(meter, "check", None)
        if check is not None and world.local_rank == 0:  # The rank that will meter its host.
            check()
        data = as_data_module(instantiate(config.data, allow=allow, where="data"), name=str(config.data["_target_"]))
        if len(data.train) < world.size:
            raise DataError(
                f"the training split has {len(data.train)} samples for {world.size} ranks; start at most {len(data.train)} ranks"
            )
        externals = {
            source: open_artifact(source)
            for node in nodes
            for source in node.needs.values()
            if is_external(source) and not node.off
        }
        prepared = Prepared(job, nodes, data, meter, tracker, externals)
        for node in nodes:
            if node.off is None:
                _check_stage(node, prepared, world)
    return prepared


def _check_stage(node: Node, prepared: Prepared, world: World) -> None:
    stage, where = node.config, f"stages.{node.name}"
    for role, source in node.needs.items():
        if is_external(source):
            _check_external(node, role, prepared)
    if isinstance(stage, TrainStage):
        _check_train(node, stage, prepared, world)
    if isinstance(stage, QuantizeStage):
        _check_quantize(stage, prepared, where)
    if isinstance(stage, EvaluateStage):
        if stage.split not in ("test", "validation", "train"):
            raise ConfigError(f"{where}.split={stage.split} is not a split; use test, validation or train")
        if stage.format is not None and stage.format not in FORMATS:
            raise ConfigError(f"{where}.format={stage.format} is not known; use {' or '.join(FORMATS)}, or null")
        if getattr(prepared.data, stage.split) is None:
            raise DataError(f"{where}.split={stage.split}: the data set has no such split; use test or train")
    prepared.task_of(node)


def _check_external(node: Node, role: str, prepared: Prepared) -> None:
    """Check an artifact that a need names by its path: its kind and, where the stage feeds it the data set, its classes."""
    from horovod_jobs.stages.evaluate import check_classes
    from horovod_jobs.stages.train import artifact_name

    artifact = prepared.externals[node.needs[role]]
    check_external(node, role, artifact.kind)
    # Weights to start from (init) may come from other classes; a report only tells of what it is given.
    if role in ("teacher", "model") and role in node.config.INPUTS:
        where = f"stages.{node.name}.needs.{role}={node.needs[role]}"
        called = f"{'teacher ' if role == 'teacher' else ''}{artifact_name(artifact)}"
        check_classes(prepared.data, read_config(artifact), where=where, model=called)


def _check_quantize(stage: QuantizeStage, prepared: Prepared, where: str) -> None:
    data, allow = prepared.data, prepared.job.config.allow_targets
    instantiate(stage.quantizer, allow=allow, where=f"{where}.quantizer")
    if stage.calibration_samples > len(data.train):
        raise ConfigError(
            f"{where}.calibration_samples={stage.calibration_samples} does not fit the training split of {len(data.train)} "
            f"samples; use 1 to {len(data.train)}"
        )
    name, split = ("test", data.test) if data.validation is None else ("validation", data.validation)
    if stage.check_samples is not None and stage.check_samples > len(split):
        raise ConfigError(
            f"{where}.check_samples={stage.check_samples} does not fit the {name} split of {len(split)} samples; "
            f"use 1 to {len(split)}, or null for all"
        )


def _check_train(node: Node, stage: TrainStage, prepared: Prepared, world: World) -> None:
    """Build every part once, so that a student which cannot be trained is found before its teacher is."""
    from horovod_jobs.data.sharding import check_divides
    from horovod_jobs.stages.train import make_model, outputs_of, start_from
    from horovod_jobs.training.precision import choose_device

    allow, data, fit, where = prepared.job.config.allow_targets, prepared.data, stage.fit, f"stages.{node.name}"
    choose_device(fit.device, local_rank=world.local_rank)
    global_batch = effective_global_batch(fit, world_size=world.size)
    check_divides(global_batch, size=world.size, accumulate=fit.accumulate)
    if fit.drop_last and global_batch > len(data.train):
        raise ConfigError(
            f"{where}.fit.drop_last=true leaves no batch of global_batch={global_batch} in {len(data.train)} training samples; "
            f"use drop_last=false, or a global_batch of at most {len(data.train)}"
        )
    _check_validated(fit, where, has_split=data.validation is not None)
    for part in ("model", "optimizer", "schedule", "strategy"):
        if not is_node(getattr(stage, part)):
            group = "model@student" if part == "model" and isinstance(stage, DistillStage) else part
            raise ConfigError(f"{where}.{part}={getattr(stage, part)} names nothing to build; choose one ({group}=...)")
    for part in ("schedule", "strategy", *(("loss",) if stage.loss is not None else ())):
        instantiate(getattr(stage, part), allow=allow, where=f"{where}.{part}")
    model = make_model(stage.model, data, where=where, allow=allow)
    outputs_of(model, data, where=where)
    if (start := prepared.externals.get(node.needs.get("init", ""))) is not None:
        start_from(model, start, where=where, allow=allow)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    instantiate(stage.optimizer, allow=allow, where=f"{where}.optimizer", params=trainable)
    if isinstance(stage, DistillStage):
        distiller = instantiate(stage.distiller, allow=allow, where=f"{where}.distiller")
        if distiller.cache and stage.augment and data.augment is not None:
            raise ConfigError(
                f"{where}.distiller.cache=true keeps the teacher's outputs for the images as they are, and the data set augments "
                f"them; set {where}.augment=false, or distiller.cache=false"
            )


def _check_validated(fit: FitConfig, where: str, *, has_split: bool) -> None:
    """What goes by the validation split needs one; early stopping needs to look at it while it trains."""
    if not has_split and fit.publish == "best":
        raise ConfigError(
            f"{where}.fit.publish=best goes by the validation split, and the data set has none; give it one, or use fit.publish=last"
        )
    if fit.early_stop_epochs is not None and (not has_split or fit.validate_every_epochs == 0):
        why = (
            "fit.validate_every_epochs=0 looks at it after the last epoch only"
            if has_split
            else "the data set has none"
        )
        raise ConfigError(
            f"{where}.fit.early_stop_epochs={fit.early_stop_epochs} goes by the validation split, and {why}; "
            f"{'use 1, say' if has_split else 'give it one'}, or leave fit.early_stop_epochs out"
        )


def plan(job: Job, world: World, store: ArtifactStore, prepared: Prepared) -> list[Planned]:
    """Collective. Decide about every stage, in the graph's order. Rank 0 looks into the store and checks every file."""
    prints = {source: artifact.fingerprint for source, artifact in prepared.externals.items()}
    planned = []
    machine = world.broadcast_json(cpu_name(), name="plan.machine")
    for node in prepared.nodes:
        if node.off is not None:
            planned.append(Planned(node, "skip", node.off))
            continue
        with world.agreed("plan.fingerprint"):
            prints[node.name] = _fingerprint(node, prepared, prints, world_size=world.size, machine=machine)
            whole, keys = whole_because(node, prepared), keys_of(node, prints)
        step = _decide(node, prints[node.name], store, world)
        planned.append(replace(step, whole=whole, keys=keys))
    return in_turns(planned, ranks=world.size, at_once=job.config.run.parallel_stages)


def _fingerprint(node: Node, prepared: Prepared, prints: dict[str, str], *, world_size: int, machine: str) -> str:
    stage, allow = node.config, prepared.job.config.allow_targets
    train = stage if isinstance(stage, TrainStage) else None
    strategy = locate(train.strategy["_target_"], allow=allow) if train else None
    return fingerprint(
        node,
        inputs={role: prints[source] for role, source in node.needs.items()},
        data_digest=prepared.data.digest,
        code=code_digests(asdict(stage), allow=allow),
        world_size=world_size,
        global_batch=effective_global_batch(train.fit, world_size=world_size) if train else None,
        machine=machine if isinstance(stage, EvaluateStage) else "",
        tuning_keys=getattr(strategy, "TUNING", frozenset()),
        counts_ranks=train is not None and strategy_counts_ranks(train, prepared),
    )


def _decide(node: Node, print_: str, store: ArtifactStore, world: World) -> Planned:
    kind = node.config.OUTPUT
    if not node.config.REUSE:
        return Planned(node, "run", "it is made anew in every run", print_)
    if node.config.force:
        return Planned(node, "run", "it is forced (force=true)", print_)

    def look() -> list[Any]:
        try:
            found = store.lookup(kind, print_)
        except ArtifactError as error:
            return [False, str(error)]
        checkpoint = any(store.work(kind, print_).glob("step-*"))
        return [found is not None, "no artifact yet; goes on from a checkpoint" if checkpoint else "no artifact yet"]

    there, why = world.main(look, name="plan.look")
    if not there:
        return Planned(node, "run", why, print_)
    artifact = store.lookup(kind, print_, verify=False)
    if artifact is None:
        return Planned(node, "run", why, print_)
    return Planned(node, "reuse", f"{artifact.ref} is there", print_, artifact)


def table(planned: list[Planned]) -> Any:
    """The plan as a table for the console."""
    from rich.table import Table

    shown = Table(title="Plan", title_justify="left")
    for column in ("stage", "kind", "needs", "action", "why"):
        shown.add_column(column, overflow="fold")
    for step in planned:
        needs = ", ".join(f"{role}: {source}" if role != source else role for role, source in step.node.needs.items())
        shown.add_row(step.node.name, step.node.config.kind, needs, step.action, step.why)
    return shown
