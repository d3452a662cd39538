"""Walk the graph in this world: skip, reuse, resume or run each stage, and write the manifest at every stage's end."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.artifacts import Artifact, ArtifactStore
from horovod_jobs.comm.connect import world_lost
from horovod_jobs.comm.world import World
from horovod_jobs.console import Console, EventLog, logging_to
from horovod_jobs.errors import ConfigError, Interrupted, JobError, StorageError, WorldError
from horovod_jobs.footprint import Footprint
from horovod_jobs.graph import Node
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.job import Job
from horovod_jobs.planning import Planned, Prepared, plan, prepare
from horovod_jobs.spending import Spending
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.storage import digest_of, flatten, storage_errors, update_link, write_text
from horovod_jobs.tracking import NullTracker, Tracker
from horovod_jobs.versions import versions


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    run_dir: Path
    manifest: dict[str, Any]


def check_same_config(job: Job, world: World) -> None:
    """Collective. Every rank must have composed the same job.

    Raises:
        WorldError: naming the keys that differ and who says what.
    """
    flat = dict(flatten({key: value for key, value in job.resolved.items() if key != "launch"}))
    digests = world.gather_json(digest_of(flat), name="config.digest")
    if len(set(digests)) == 1:
        return
    told = world.gather_json(flat, name="config.keys")
    keys = sorted({key for one in told for key in one if any(other.get(key) != one.get(key) for other in told)})
    shown = "; ".join(
        f"{key}: " + ", ".join(f"rank {rank} {one.get(key)!r}" for rank, one in enumerate(told)) for key in keys[:5]
    )
    raise WorldError(f"ranks were given different configs ({shown}); start every rank with the same command and files")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _make_run_dir(job: Job) -> str:
    root = Path(job.config.run.root)
    run_id = job.config.run.id or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not run_id or "/" in run_id or run_id.startswith(".") or run_id == "latest":
        raise ConfigError(f"run.id={run_id} is not a directory name; use letters, digits and dashes")
    run_dir = root / run_id
    with storage_errors("make the run directory", run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    import yaml

    write_text(run_dir / "config.yaml", yaml.safe_dump(job.resolved, sort_keys=False, allow_unicode=True))
    update_link(root / "latest", run_id)
    return str(run_dir)


class Run:
    """One run of a job: its directory, its manifest, and the stages' life cycle."""

    def __init__(self, job: Job, world: World, *, command: list[str], stop: StopRequest) -> None:
        self.job, self.world, self.command, self.stop = job, world, command, stop
        self.store = ArtifactStore(job.config.run.store)
        self.manifest: dict[str, Any] = {}
        self.log = logging.getLogger("horovod_jobs")

    def __call__(self) -> Outcome:
        """Collective. Run the job.

        Raises:
            JobError: a stage failed, or a stop was agreed; the manifest says so.
        """
        prepared = prepare(self.job, self.world)  # Before there is a directory: a job that cannot run leaves none.
        run_dir = Path(self.world.main(lambda: _make_run_dir(self.job), name="run.dir"))
        with self.world.agreed("run.visible"):
            _check_visible(run_dir)
        with ExitStack() as stack:
            config = self.job.config.run
            self.log = stack.enter_context(logging_to(run_dir / "logs", rank=self.world.rank, level=config.log_level))
            self.run_dir = run_dir
            self.console = Console(is_main=self.world.is_main, mode=config.progress)
            self.events = EventLog(run_dir / "events.jsonl" if self.world.is_main else None)
            stack.callback(self.events.close)
            self._begin_manifest()
            try:
                self._stages(stack, prepared)
            except BaseException as caught:
                lost = world_lost(caught)
                self._end(lost or caught)
                if lost is not None:
                    raise lost from caught
                raise
            self._end(None)
        return Outcome(run_dir, self.manifest)

    # --- stages -----------------------------------------------------------------------------------------------------
    def _stages(self, stack: ExitStack, prepared: Prepared) -> None:
        planned = plan(self.job, self.world, self.store, prepared)
        self.tracker = self._open_tracker(prepared.tracker)
        stack.push(lambda kind, error, trace: self.tracker.close(failed=kind is not None))
        self.spending = Spending(prepared.meter, self.world)
        for step in planned:
            self._record(step.node.name, reason=step.why, status="skipped" if step.action == "skip" else "pending")
        made: dict[str, Artifact] = dict(prepared.externals)
        twins: dict[str, Artifact] = {}  # by fingerprint
        for step in planned:
            if step.action == "skip":
                self.log.info("%s: skipped, %s", step.node.name, step.why)
                continue
            self.stop.raise_if_agreed(self.world, where=f"before stage {step.node.name}")
            # A stage that is the same as one before it takes what that one has just made.
            artifact = step.artifact if step.action == "reuse" else twins.get(step.fingerprint)
            if artifact is not None:
                made[step.node.name] = artifact
                why = step.why if step.action == "reuse" else f"the same as stage {artifact.meta['stage']}"
                self._record(step.node.name, status="reused", reason=why, **_figures(artifact))
                self.log.info("%s: reused %s", step.node.name, artifact.ref)
            else:
                made[step.node.name] = twins[step.fingerprint] = self._run(step, prepared, made)
            self._write()

    def _run(self, step: Planned, prepared: Prepared, made: dict[str, Artifact]) -> Artifact:
        node, kind, fingerprint = step.node, step.node.config.OUTPUT, step.fingerprint
        self.log.info("%s: running (%s)", node.name, step.why)
        self._record(node.name, status="running", reason=step.why)
        self._write()
        self.events.emit("stage_start", stage=node.name, kind=node.config.kind)
        with self._staged(kind, fingerprint) as staging:
            self.spending.begin()
            try:
                result = prepared.run_of(node)(self._context(node, fingerprint, staging, made, prepared), node.config)
            except BaseException:
                self.spending.abandon()
                raise
            footprint = self.spending.end()
            if result.spent_before is not None:
                footprint = result.spent_before + footprint
            meta = self._meta(node, result, footprint, made)
            path = self.world.main(
                lambda: str(self.store.publish(staging, kind=kind, fingerprint=fingerprint, meta=meta).path),
                name="stage.publish",
            )
            self.world.main(lambda: self.store.discard_work(kind, fingerprint), name="stage.clean")
        with self.world.agreed("stage.visible"):
            artifact = self._published(kind, fingerprint, path)
        self._record(node.name, status="ran", **_figures(artifact), resumed_from_step=result.resumed_from_step)
        self.events.emit("stage_end", stage=node.name, artifact=artifact.ref, seconds=round(footprint.seconds, 3))
        self.log.info("%s: done in %.1f s%s", node.name, footprint.seconds, _headline(result))
        return artifact

    @contextmanager
    def _staged(self, kind: str, fingerprint: str) -> Iterator[Path]:
        """Collective. A staging directory on rank 0, under the artifact's lock; nothing is left of it afterwards."""
        with ExitStack() as stack:

            def enter() -> str:
                stack.enter_context(self.store.lock(kind, fingerprint))
                self.store.sweep_staging(kind, fingerprint)
                return str(self.store.staging(kind, fingerprint))

            staging = Path(self.world.main(enter, name="stage.enter"))
            try:
                yield staging
            finally:
                if self.world.is_main:
                    shutil.rmtree(staging, ignore_errors=True)

    def _published(self, kind: str, fingerprint: str, path: str) -> Artifact:
        artifact = self.store.lookup(kind, fingerprint, verify=False)
        if artifact is None:
            raise StorageError(
                f"rank {self.world.rank} does not see {path}; put run.store on a file system that all hosts share"
            )
        return artifact

    def _context(
        self, node: Node, fingerprint: str, staging: Path, made: dict[str, Artifact], prepared: Prepared
    ) -> StageContext:
        return StageContext(
            name=node.name,
            fingerprint=fingerprint,
            world=self.world,
            inputs={role: made[source] for role, source in node.needs.items()},
            staging=staging,
            work=self.store.work(node.config.OUTPUT, fingerprint),
            run_dir=self.run_dir,
            store=self.store,
            data=prepared.data,
            task=prepared.task_of(node),
            allow_targets=tuple(self.job.config.allow_targets),
            seed=node.config.seed,
            log=self.log,
            console=self.console,
            events=self.events,
            tracker=self.tracker,
            stop=self.stop,
            spent=self.spending.so_far,
        )

    def _meta(self, node: Node, result: StageResult, footprint: Footprint, made: dict[str, Artifact]) -> dict[str, Any]:
        return {
            "stage": node.name,
            "stage_kind": node.config.kind,
            "created_at": _now(),
            "seconds": footprint.seconds,
            "metrics": result.metrics,
            "parameters": result.parameters,
            "model_bytes": result.model_bytes,
            "latency_ms": result.latency_ms,
            "details": result.details,
            "footprint": footprint.to_json(),
            "inputs": {role: {"ref": made[s].ref, "stage": s, "kind": made[s].kind} for role, s in node.needs.items()},
            "config": self.job.resolved["stages"][node.name],
        }

    def _open_tracker(self, tracker: Tracker) -> Tracker:
        """Collective: an error on rank 0 stops all."""
        mine: Tracker = tracker if self.world.is_main else NullTracker()
        self.world.main(
            lambda: mine.open(run_dir=self.run_dir, run_id=self.run_dir.name, config=self.job.resolved),
            name="tracker.open",
        )
        return mine

    # --- manifest ---------------------------------------------------------------------------------------------------
    def _begin_manifest(self) -> None:
        hosts, size = self.world.cross_size, self.world.size
        self.manifest = {
            "schema_version": 1,
            "run_id": self.run_dir.name,
            "name": self.job.config.name,
            "status": "running",
            "started_at": _now(),
            "ended_at": None,
            "command": self.command,
            "error": None,
            "exit_code": None,
            "store": _relative(self.store.root, self.run_dir),
            "world": {"size": size, "hosts": hosts, "controller": self.world.controller},
            "versions": versions(),
            "config_digest": digest_of(self.job.resolved),
            "stages": [_empty_entry(name, stage.kind, stage.needs) for name, stage in self.job.stages.items()],
            "totals": {},
        }
        self._started = time.monotonic()
        self._write()

    def _record(self, name: str, **values: Any) -> None:
        entry = next(entry for entry in self.manifest["stages"] if entry["name"] == name)
        entry.update(values)

    def _write(self) -> None:
        """Collective."""
        self._total()
        self.world.main(lambda: manifests.write(self.run_dir, self.manifest), name="manifest.write")

    def _total(self) -> None:
        entries = self.manifest["stages"]
        ran = [entry for entry in entries if entry["status"] == "ran"]
        used = [entry for entry in entries if entry["status"] in ("ran", "reused")]
        keys = ("energy_kwh", "co2_kg", "cost_usd")
        self.manifest["totals"] = {
            "seconds": time.monotonic() - self._started,
            **{key: _sum(entry[key] for entry in ran) for key in keys},
            "artifacts": {key: _sum(entry[key] for entry in used) for key in keys},
        }

    def _end(self, error: BaseException | None) -> None:
        """Not a collective: a rank that fails alone must not wait for the others."""
        status, code = "done", 0
        if error is not None:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            code = error.exit_code if isinstance(error, JobError) else 1
            for entry in self.manifest["stages"]:
                if entry["status"] == "running":
                    entry.update(
                        status="failed" if status == "failed" else "pending",
                        reason=str(error).splitlines()[0] if str(error) else status,
                    )
        self.manifest.update(
            status=status, ended_at=_now(), exit_code=code, error=None if error is None else str(error) or repr(error)
        )
        self._total()
        self.events.emit("job_end", status=status, exit_code=code)
        if self.world.is_main:
            try:
                manifests.write(self.run_dir, self.manifest)
            except JobError as unwritten:
                self.log.warning("the manifest could not be completed: %s", unwritten)


def _empty_entry(name: str, kind: str, needs: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "needs": dict(needs),
        "status": "pending",
        "reason": None,
        "artifact": None,
        "seconds": None,
        "metrics": {},
        "parameters": None,
        "model_bytes": None,
        "latency_ms": None,
        "energy_kwh": None,
        "co2_kg": None,
        "cost_usd": None,
        "footprint_method": None,
        "resumed_from_step": None,
    }


def _figures(artifact: Artifact) -> dict[str, Any]:
    """A manifest entry's figures, from the artifact: what it cost to make, also where it is reused."""
    footprint = artifact.meta["footprint"]
    return {
        "artifact": artifact.ref,
        "seconds": footprint["seconds"],
        **{key: artifact.meta[key] for key in ("metrics", "parameters", "model_bytes", "latency_ms")},
        **{key: footprint[key] for key in ("energy_kwh", "co2_kg", "cost_usd")},
        "footprint_method": footprint["method"],
    }


def _headline(result: StageResult) -> str:
    shown = [
        f"{key.replace('_', ' ')} {value:.4g}"
        for key, value in result.metrics.items()
        if key in ("accuracy", "validation_accuracy", "drop_points", "samples_per_s", "worst_class_accuracy")
    ]
    return f" ({', '.join(shown)})" if shown else ""


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown: a part is not passed off as the whole."""
    known = list(values)
    return None if any(value is None for value in known) else float(sum(value for value in known if value is not None))


def _relative(path: Path, start: Path) -> str:
    import os

    return os.path.relpath(path.resolve(), start.resolve())


def _check_visible(run_dir: Path) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise StorageError(
            f"run directory {run_dir} is not visible on this host; put run.root on a file system that all hosts share"
        )
