"""Walk the graph in this world: skip, reuse, resume or run each stage, and write the manifest at every stage's end."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.artifacts import Artifact, ArtifactStore
from horovod_jobs.chaos import Striker
from horovod_jobs.comm.connect import world_lost
from horovod_jobs.comm.roles import roles_of
from horovod_jobs.comm.world import World
from horovod_jobs.config import RunConfig
from horovod_jobs.console import Console, EventLog, logging_to, say_json
from horovod_jobs.errors import ArtifactError, ConfigError, JobError, StorageError, WorldError
from horovod_jobs.instantiate import instantiate, is_node
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.job import Job
from horovod_jobs.lifecycle import Workplace, make
from horovod_jobs.origin import origin
from horovod_jobs.parallel import side_by_side
from horovod_jobs.planning import Planned, Prepared, plan, prepare
from horovod_jobs.pulse import DIRECTORY as RANKS
from horovod_jobs.pulse import ENDED_LIMIT_S, Pulse
from horovod_jobs.record import Record, figures
from horovod_jobs.spending import Spending
from horovod_jobs.storage import check_can_write, digest_of, flatten, locked, storage_errors, update_link, write_text
from horovod_jobs.tracking import NullTracker, Tracker

_NOT_THE_WORK = ("launch", "run", "chaos")  # parts of a config that may differ between two tries of the same job


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


def check_place(job: Job) -> None:
    """For a plan: what the run's directory and the store would be refused for. Nothing is left behind.

    Raises:
        StorageError: they cannot be made or written to.
        ConfigError: another job's run has this id.
    """
    run = job.config.run
    for path, key in ((Path(run.root, run.id or ""), "run.root=..."), (Path(run.store), "run.store=...")):
        with storage_errors("write to", path, keys=key):
            check_can_write(path)
    if run.id:
        _check_not_anothers(job, Path(run.root, run.id))


def _make_run_dir(job: Job, stack: ExitStack) -> str:
    """The run's directory, which stays this job's until ``stack`` is closed."""
    root = Path(job.config.run.root)
    run_id = job.config.run.id or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    run_dir = root / run_id
    with storage_errors("make the run directory", run_dir, keys="run.root=..."):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    busy = f"run {run_id} is another job's at this moment ({{holder}}); wait for it to end, or leave run.id out"
    stack.enter_context(locked(run_dir / ".lock", busy=busy))
    import yaml

    _check_not_anothers(job, run_dir)
    shutil.rmtree(run_dir / RANKS, ignore_errors=True)  # Signs of life of an earlier try.
    write_text(run_dir / "config.yaml", yaml.safe_dump(job.resolved, sort_keys=False, allow_unicode=True))
    update_link(root / "latest", run_id)
    return str(run_dir)


def _check_not_anothers(job: Job, run_dir: Path) -> None:
    """A run that has come to its end is kept: only the same job may take its place. One that failed may be mended and go on.

    Raises:
        ConfigError: another job's run has this id.
    """
    import yaml

    try:
        if manifests.read(run_dir)["status"] != "done":
            return
        before = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        old, new = (
            {key: value for key, value in flatten(one) if key.split(".")[0] not in _NOT_THE_WORK}
            for one in (before, job.resolved)
        )
    except (OSError, ArtifactError, yaml.YAMLError, AttributeError):
        return  # No run, or none that tells anything.
    differing = sorted(key for key in old | new if old.get(key) != new.get(key))
    if differing:
        shown = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in differing[:3])
        raise ConfigError(
            f"run.id={run_dir.name} is a run of another job, which is complete ({shown}); give this one another run.id, or remove {run_dir}"
        )


class Run:
    """One run of a job: its directory, its record, and the stages in their turns."""

    def __init__(
        self,
        job: Job,
        world: World,
        *,
        command: list[str],
        stop: StopRequest,
        give_up: Callable[[JobError], Any],
        goes_on: Callable[[BaseException], bool],
    ) -> None:
        """``give_up`` ends this process. ``goes_on``: after this error the job goes on in another world, so the record stays open."""
        self.job, self.world, self.command, self.stop, self.give_up = job, world, command, stop, give_up
        self.goes_on = goes_on
        self.store = ArtifactStore(job.config.run.store)
        self.log = logging.getLogger("horovod_jobs")

    def __call__(self) -> Outcome:
        """Collective. Run the job.

        Raises:
            JobError: a stage failed, or a stop was agreed; the manifest says so.
        """
        prepared = prepare(self.job, self.world)  # Before there is a directory: a job that cannot run leaves none.
        self.world.main(self.store.make, name="run.store")
        with ExitStack() as stack:
            run_dir = Path(self.world.main(lambda: _make_run_dir(self.job, stack), name="run.dir"))
            with self.world.agreed("run.visible"):
                _check_visible(run_dir)
            config = self.job.config.run
            self.log = stack.enter_context(logging_to(run_dir / "logs", rank=self.world.rank, level=config.log_level))
            self.run_dir = run_dir
            self.events = EventLog(
                run_dir / "events.jsonl" if self.world.is_main else None, echo=config.progress == "json"
            )
            stack.callback(self.events.close)
            self.record = Record(
                self.job, self.world, run_dir=run_dir, command=self.command, origin=self._origin(prepared)
            )
            self._write()
            self.console = Console(is_main=self.world.is_main, mode=config.progress)
            if is_node(self.job.config.chaos):
                chaos = instantiate(self.job.config.chaos, allow=self.job.config.allow_targets, where="chaos")
                self.console.listener = Striker(chaos, self.world, root=Path(config.root))
            roles = roles_of(self.world)
            pulse = self._pulse(config, servers=roles.server_ranks if roles is not None else ())
            pulse.start()
            stack.callback(pulse.stop)
            if roles is not None:
                roles.tell_run(str(run_dir))
                stack.callback(roles.tell_run, None)
            try:
                self._stages(stack, prepared)
            except BaseException as caught:
                lost = world_lost(caught, world=self.world)
                if not self.goes_on(lost or caught):
                    self._end(lost or caught)
                if lost is not None:
                    raise lost from caught
                raise
            self._end(None)
        return Outcome(run_dir, self.record.manifest)

    # --- stages -----------------------------------------------------------------------------------------------------
    def _stages(self, stack: ExitStack, prepared: Prepared) -> None:
        planned = plan(self.job, self.world, self.store, prepared)
        place = self._workplace(stack, prepared)
        for step in planned:
            status = "skipped" if step.action == "skip" else "pending"
            self.record.stage(step.node.name, reason=step.why, status=status)
        made: dict[str, Artifact] = dict(prepared.externals)
        twins: dict[str, Artifact] = {}  # by fingerprint
        for _, turn in itertools.groupby(planned, key=lambda step: step.turn):
            steps = [step for step in turn if not self._skipped(step)]
            if steps:
                names = ", ".join(step.node.name for step in steps)
                self.stop.raise_if_agreed(self.world, where=f"before stage {names}")
            steps = [step for step in steps if not self._reused(step, made, twins)]
            if len(steps) == 1:
                made[steps[0].node.name] = make(steps[0], prepared, made, place)
            elif steps:
                made |= side_by_side(steps, prepared, made, place, self.record)
            twins |= {step.fingerprint: made[step.node.name] for step in steps}

    def _origin(self, prepared: Prepared) -> dict[str, Any]:
        """Collective: rank 0 asks git, and every rank keeps the same manifest."""

        def look() -> dict[str, Any]:
            allowed = self.job.config.allow_targets
            return origin(Path.cwd(), environ=os.environ, allow_targets=allowed, data_digest=prepared.data.digest)

        return self.world.main(look, name="run.origin")

    def _skipped(self, step: Planned) -> bool:
        if step.action == "skip":
            self.log.info("%s: skipped, %s", step.node.name, step.why)
        return step.action == "skip"

    def _reused(self, step: Planned, made: dict[str, Artifact], twins: dict[str, Artifact]) -> bool:
        """Collective. Take the artifact that is there already, or that a stage which is the same has just made."""
        name = step.node.name
        artifact = step.artifact if step.action == "reuse" else twins.get(step.fingerprint)
        if artifact is None:
            return False
        made[name] = artifact
        why = step.why if step.action == "reuse" else f"the same as stage {artifact.meta['stage']}"
        self._tell(name, status="reused", reason=why, **figures(artifact))
        self.log.info("%s: reused %s", name, artifact.ref)
        return True

    def _workplace(self, stack: ExitStack, prepared: Prepared) -> Workplace:
        """Collective. The whole world as a place to make stages in."""
        tracker = self._open_tracker(prepared.tracker)
        stack.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
        return Workplace(
            world=self.world,
            stop=self.stop,
            spending=Spending(prepared.meter, self.world),
            console=self.console,
            events=self.events,
            tracker=tracker,
            record=self._tell,
            log=self.log,
            store=self.store,
            run_dir=self.run_dir,
        )

    def _open_tracker(self, tracker: Tracker) -> Tracker:
        """Collective: an error on rank 0 stops all."""
        mine: Tracker = tracker if self.world.is_main else NullTracker()
        self.world.main(
            lambda: mine.open(run_dir=self.run_dir, run_id=self.run_dir.name, config=self.job.resolved),
            name="tracker.open",
        )
        return mine

    def _pulse(self, config: RunConfig, *, servers: tuple[int, ...]) -> Pulse:
        def end(error: WorldError, lost: list[int]) -> None:
            self.log.error("%s", error)
            if 0 in lost and self.world.rank == min(set(range(self.world.size)) - set(lost)):
                self.record.take_over()
            self._end(error)
            self.give_up(error)

        return Pulse(
            self.world,
            run_dir=self.run_dir,
            console=self.console,
            silent_limit_s=config.silent_limit_s,
            stall_limit_s=config.stall_limit_s,
            # Under Gloo an elastic world is made anew, and some ranks leave the old one before others.
            ended_limit_s=ENDED_LIMIT_S if self.world.controller == "mpi" else None,
            end=end,
            servers=servers,
            tell=say_json if self.world.is_main and config.progress == "json" else None,
        )

    # --- the record -------------------------------------------------------------------------------------------------
    def _tell(self, name: str, **values: Any) -> None:
        """Collective."""
        self.record.stage(name, **values)
        self._write()

    def _write(self) -> None:
        """Collective."""
        self.world.main(self.record.write, name="manifest.write")

    def _end(self, error: BaseException | None) -> None:
        """Not a collective: a rank that fails alone must not wait for the others."""
        status, code = self.record.end(error, log=self.log)
        self.events.emit("job_end", status=status, exit_code=code)


def _check_visible(run_dir: Path) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise StorageError(
            f"run directory {run_dir} is not visible on this host; put run.root on a file system that all hosts share"
        )
