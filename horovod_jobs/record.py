"""What a run writes down as it goes: the manifest, kept on every rank and written by rank 0 alone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.artifacts import Artifact
from horovod_jobs.comm.world import World
from horovod_jobs.errors import Interrupted, JobError
from horovod_jobs.job import Job
from horovod_jobs.storage import digest_of
from horovod_jobs.versions import versions

_COSTS = ("energy_kwh", "co2_kg", "cost_usd")


def now() -> str:
    """This moment in UTC, as the manifest and artifacts write it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Record:
    """A run's manifest. Where stages run side by side, two threads of rank 0 tell it things."""

    def __init__(self, job: Job, world: World, *, run_dir: Path, command: list[str], origin: dict[str, Any]) -> None:
        self._run_dir, self._is_main, self._world = run_dir, world.is_main, world
        self._lock = threading.Lock()
        self._begun: set[str] = set()  # stages that cost something, whatever becomes of them
        self._started = time.monotonic()
        self.manifest: dict[str, Any] = {
            "schema_version": 1,
            "run_id": run_dir.name,
            "name": job.config.name,
            "status": "running",
            "started_at": now(),
            "ended_at": None,
            "command": command,
            "error": None,
            "exit_code": None,
            "store": os.path.relpath(Path(job.config.run.store).resolve(), run_dir.resolve()),
            "world": {"size": world.size, "hosts": world.cross_size, "controller": world.controller},
            "versions": versions(),
            "config_digest": digest_of(job.resolved),
            "origin": origin,
            "stages": [_empty_entry(name, stage.kind, stage.needs) for name, stage in job.stages.items()],
            "totals": {},
        }

    def stage(self, name: str, **values: Any) -> None:
        """Note what is now known of a stage."""
        with self._lock:
            if values.get("status") == "running":
                self._begun.add(name)
            next(entry for entry in self.manifest["stages"] if entry["name"] == name).update(values)

    def write(self) -> None:
        """Rank 0 replaces the run's manifest.

        Raises:
            StorageError: it cannot be written; the one before stays.
        """
        with self._lock:
            self._total()
            if self._world.lost:
                self.manifest["world"]["lost"] = list(self._world.lost)
            if self._is_main:
                manifests.write(self._run_dir, self.manifest)

    def take_over(self) -> None:
        """Write from this rank from now on: rank 0 is lost. Every rank has kept the same manifest."""
        self._is_main = True

    def end(self, error: BaseException | None, *, log: logging.Logger) -> tuple[str, int]:
        """Write how the run ended; gives its status and exit code. Not a collective: a rank that fails alone asks nobody."""
        status, code = "done", 0
        if error is not None:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            code = error.exit_code if isinstance(error, JobError) else 1
            for entry in self.manifest["stages"]:
                if entry["status"] == "running":
                    self.stage(
                        entry["name"],
                        status="failed" if status == "failed" else "pending",
                        reason=first_line(error) or status,
                    )
        text = None if error is None else str(error) or repr(error)
        with self._lock:
            self.manifest.update(status=status, ended_at=now(), exit_code=code, error=text)
        try:
            self.write()
        except JobError as unwritten:
            log.warning("the manifest could not be completed: %s", unwritten)
        return status, code

    def _total(self) -> None:
        entries = self.manifest["stages"]
        ran = [entry for entry in entries if entry["status"] == "ran"]
        used = [entry for entry in entries if entry["status"] in ("ran", "reused")]
        begun = [
            entry for entry in entries if entry["name"] in self._begun and entry["status"] in ("pending", "failed")
        ]
        self.manifest["totals"] = {
            "seconds": time.monotonic() - self._started,
            **{key: _sum(entry[key] for entry in ran + begun) for key in _COSTS},
            "artifacts": {key: _sum(entry[key] for entry in used) for key in _COSTS},
        }


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else ""


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
        **dict.fromkeys(_COSTS),
        "footprint_method": None,
        "resumed_from_step": None,
    }


def figures(artifact: Artifact) -> dict[str, Any]:
    """A manifest entry's figures, from the artifact: what it cost to make, also where it is reused."""
    return {
        "artifact": artifact.ref,
        **{key: artifact.meta[key] for key in ("metrics", "parameters", "model_bytes", "latency_ms")},
        **bill(artifact.meta["footprint"]),
    }


def bill(footprint: dict[str, Any]) -> dict[str, Any]:
    """A footprint as it stands in a stage's entry."""
    return {
        "seconds": footprint["seconds"],
        **{key: footprint[key] for key in _COSTS},
        "footprint_method": footprint["method"],
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown: a part is not passed off as the whole."""
    known = list(values)
    return None if any(value is None for value in known) else float(sum(value for value in known if value is not None))
