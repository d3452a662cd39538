"""The life of one stage in a world, the whole one or a part of it: staged, run, paid for, published, recorded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_jobs.artifacts import Artifact, ArtifactStore
from horovod_jobs.comm.world import World
from horovod_jobs.console import Console, EventLog
from horovod_jobs.errors import Interrupted, StorageError
from horovod_jobs.footprint import Footprint
from horovod_jobs.formats import throughput
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.planning import Planned, Prepared
from horovod_jobs.record import bill, figures, now
from horovod_jobs.spending import Spending
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.tracking import Tracker


@dataclass(frozen=True)
class Workplace:
    """What a stage works in and with, and where its news go. ``record`` is collective: it tells the manifest about the stage."""

    world: World
    stop: StopRequest
    spending: Spending
    console: Console
    events: EventLog
    tracker: Tracker
    record: Callable[..., None]  # (name of the stage, **values of its manifest entry)
    log: logging.Logger
    store: ArtifactStore
    run_dir: Path


def make(step: Planned, prepared: Prepared, made: Mapping[str, Artifact], place: Workplace) -> Artifact:
    """Collective over ``place.world``. Run a stage and publish its artifact.

    Raises:
        JobError: the stage failed or was stopped; nothing is published.
    """
    node, kind, fingerprint = step.node, step.node.config.OUTPUT, step.fingerprint
    world, spending = place.world, place.spending
    place.log.info("%s: running (%s)", node.name, step.why)
    place.record(node.name, status="running", reason=step.why)
    place.events.emit("stage_start", stage=node.name, kind=node.config.kind)
    with _staged(kind, fingerprint, place) as staging:
        spending.begin()
        try:
            result = prepared.run_of(node)(_context(step, staging, made, prepared, place), node.config)
        except BaseException as error:
            spent = spending.abandon()
            # Read when the checkpoint was written, just before.
            if isinstance(error, Interrupted) and spent is not None:
                place.record(node.name, **bill(spent.to_json()))
            raise
        footprint = spending.end()
        if result.spent_before is not None:
            footprint = result.spent_before + footprint
        meta = _meta(step, result, footprint, made, prepared)
        path = world.main(
            lambda: str(place.store.publish(staging, kind=kind, fingerprint=fingerprint, meta=meta).path),
            name="stage.publish",
        )
        world.main(lambda: place.store.discard_work(kind, fingerprint), name="stage.clean")
    with world.agreed("stage.visible"):
        artifact = published(place.store, kind, fingerprint, path=path, rank=world.rank)
    place.record(node.name, status="ran", **figures(artifact), resumed_from_step=result.resumed_from_step)
    place.events.emit("stage_end", stage=node.name, artifact=artifact.ref, seconds=round(footprint.seconds, 3))
    place.log.info("%s: done in %.1f s%s", node.name, footprint.seconds, _headline(result))
    return artifact


@contextmanager
def _staged(kind: str, fingerprint: str, place: Workplace) -> Iterator[Path]:
    """Collective. A staging directory on rank 0, under the artifact's lock; nothing is left of it afterwards."""
    with ExitStack() as stack:

        def enter() -> str:
            stack.enter_context(place.store.lock(kind, fingerprint))
            place.store.sweep_staging(kind, fingerprint)
            return str(place.store.staging(kind, fingerprint))

        staging = Path(place.world.main(enter, name="stage.enter"))
        try:
            yield staging
        finally:
            if place.world.is_main:
                shutil.rmtree(staging, ignore_errors=True)


def published(store: ArtifactStore, kind: str, fingerprint: str, *, path: str, rank: int) -> Artifact:
    """An artifact that another rank has just published.

    Raises:
        StorageError: this rank does not see it.
    """
    artifact = store.lookup(kind, fingerprint, verify=False)
    if artifact is None:
        raise StorageError(f"rank {rank} does not see {path}; put run.store on a file system that all hosts share")
    return artifact


def _context(
    step: Planned, staging: Path, made: Mapping[str, Artifact], prepared: Prepared, place: Workplace
) -> StageContext:
    node = step.node
    return StageContext(
        name=node.name,
        fingerprint=step.fingerprint,
        world=place.world,
        inputs={role: made[source] for role, source in node.needs.items()},
        staging=staging,
        work=place.store.work(node.config.OUTPUT, step.fingerprint),
        run_dir=place.run_dir,
        store=place.store,
        data=prepared.data,
        task=prepared.task_of(node),
        allow_targets=tuple(prepared.job.config.allow_targets),
        seed=node.config.seed,
        log=place.log,
        console=place.console,
        events=place.events,
        tracker=place.tracker,
        stop=place.stop,
        spent=place.spending.so_far,
    )


def _meta(
    step: Planned, result: StageResult, footprint: Footprint, made: Mapping[str, Artifact], prepared: Prepared
) -> dict[str, Any]:
    node = step.node
    return {
        "stage": node.name,
        "stage_kind": node.config.kind,
        "created_at": now(),
        "seconds": footprint.seconds,
        "metrics": result.metrics,
        "parameters": result.parameters,
        "model_bytes": result.model_bytes,
        "latency_ms": result.latency_ms,
        "details": result.details,
        "footprint": footprint.to_json(),
        "inputs": {role: {"ref": made[s].ref, "stage": s, "kind": made[s].kind} for role, s in node.needs.items()},
        "config": prepared.job.resolved["stages"][node.name],
    }


def _headline(result: StageResult) -> str:
    shown = [
        throughput(value) if key == "samples_per_s" else f"{key.replace('_', ' ')} {value:.4g}"
        for key, value in result.metrics.items()
        if key.removeprefix("validation_") in ("accuracy", "auc")
        or key in ("drop_points", "samples_per_s", "worst_class_accuracy", "calibration")
    ]
    return f" ({', '.join(shown)})" if shown else ""
