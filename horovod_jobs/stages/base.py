"""What a stage is given and what it gives back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_jobs.artifacts import Artifact, ArtifactStore
from horovod_jobs.comm.world import World
from horovod_jobs.console import Console, EventLog
from horovod_jobs.footprint import Footprint
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.tracking import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

    from horovod_jobs.data.base import DataModule
    from horovod_jobs.tasks.base import Task


@dataclass(frozen=True)
class StageContext:
    """Everything of the job that a stage may touch. Rank 0 writes the artifact's files into ``staging``; the runner publishes."""

    name: str
    fingerprint: str
    world: World
    inputs: Mapping[str, Artifact]  # by role
    staging: Path
    work: Path  # survives an interruption: checkpoints
    run_dir: Path
    store: ArtifactStore
    data: DataModule
    task: Task
    allow_targets: tuple[str, ...]
    seed: int
    log: logging.Logger
    console: Console
    events: EventLog
    tracker: Tracker
    stop: StopRequest
    spent: Callable[[], Footprint]  # collective: what this stage has cost so far in this run


@dataclass
class StageResult:
    """What a stage found. Every rank returns it; rank 0's is kept."""

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    model_bytes: int | None = None
    latency_ms: dict[str, dict[str, float]] | None = None
    resumed_from_step: int | None = None
    spent_before: Footprint | None = None  # what earlier, interrupted attempts had cost up to their last checkpoint
