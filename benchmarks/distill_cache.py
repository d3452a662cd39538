"""A student's training step under a live teacher, under the teacher's cached outputs, and without a teacher; and what the cache costs.

One process, real Fashion-MNIST, the models of the main job. The three stages run in threads that take turns: each trains a block of
steps while the others wait, so that a drift of the machine falls on all of them.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import conclude, note, paired, parser, spread, table

GLOBAL_BATCH = 128
_OPTIMIZER = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
_SCHEDULE = {"_target_": "horovod_jobs.training.schedules.OneCycle"}
_CNN = "horovod_jobs.models.cnn.StridedCnn"
_TEACHER = {"_target_": _CNN, "widths": [32, 48, 96, 160], "strides": [2, 2, 1, 2]}
_STUDENT = {"_target_": _CNN, "widths": [8, 16, 24, 32], "strides": [2, 1, 2, 2]}
_LOSSES = "horovod_jobs.distillation.losses"
_TERMS = {
    "soft": {"_target_": f"{_LOSSES}.SoftTargets", "weight": 0.9},
    "hard": {"_target_": f"{_LOSSES}.HardLabels", "weight": 0.1},
}
SYSTEMS = ("live", "cached", "plain")


class Turns:
    """Lets one of several threads run at a time, a block each, and times the blocks."""

    def __init__(self, *, warmup: int, steps: int, rounds: int) -> None:
        self.warmup, self.steps, self.rounds = warmup, steps, rounds
        self.ms: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        self.failed: BaseException | None = None
        self._turn = 0
        self._changed = threading.Condition()

    def wait(self, system: str) -> None:
        """Until it is this system's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.failed or SYSTEMS[self._turn % len(SYSTEMS)] == system)
            if self.failed:
                raise RuntimeError("another system failed") from self.failed

    def next(self) -> None:
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.failed = self.failed or error
            self._changed.notify_all()


class InTurn:
    """A strategy for a world of one whose updater gives the turn away after every block of steps."""

    TUNING: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, turns: Turns, system: str) -> None:
        from horovod_jobs.strategy.allreduce import Allreduce

        self._inner, self._turns, self._system = Allreduce(tune=False), turns, system
        self._done, self._since = 0, 0.0

    def environment(self) -> dict[str, str]:
        return {}

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        updater: Any = self._inner.bind(*args, **kwargs)
        updater.finish_step = self._finish_step
        return updater

    def _finish_step(self, spent: Any) -> None:
        now = time.perf_counter()
        self._done += 1
        measured, turns = self._done - self._turns.warmup, self._turns
        if measured < 0 or measured % turns.steps:
            return
        if measured:
            turns.ms[self._system].append(1000 * (now - self._since) / turns.steps)
        turns.next()
        if measured < turns.rounds * turns.steps:
            turns.wait(self._system)
        self._since = time.perf_counter()


def in_turn(strategy: InTurn) -> InTurn:
    """Named as a stage's strategy: the one that is there already."""
    return strategy


def context(directory: Path, *, name: str, data: Any, inputs: dict[str, Any] | None = None) -> Any:
    """A stage's context in one process, without a runner."""
    from horovod_jobs.artifacts import ArtifactStore
    from horovod_jobs.comm.world import SingleWorld
    from horovod_jobs.console import Console, EventLog
    from horovod_jobs.footprint import Footprint
    from horovod_jobs.interrupt import StopRequest
    from horovod_jobs.stages.base import StageContext
    from horovod_jobs.storage import digest_of
    from horovod_jobs.tasks.classification import Classification
    from horovod_jobs.tracking import NullTracker

    store, fingerprint = ArtifactStore(directory / "store"), digest_of(name)
    staging = directory / "staging" / name
    staging.mkdir(parents=True)
    return StageContext(
        name=name, fingerprint=fingerprint, world=SingleWorld(), inputs=inputs or {}, staging=staging,
        work=store.work("model", fingerprint), run_dir=directory, store=store, data=data,
        task=Classification(num_classes=data.num_classes), allow_targets=("benchmarks",), seed=0,
        log=logging.getLogger("bench"), console=Console(is_main=False, mode="none"), events=EventLog(None),
        tracker=NullTracker(), stop=StopRequest(), spent=Footprint.zero,
    )  # fmt: skip


def _teacher(directory: Path, *, data: Any, steps: int) -> Any:
    """A teacher after a few steps: its outputs take as long to compute as a good one's."""
    from horovod_jobs.config import FitConfig, TrainStage
    from horovod_jobs.stages import train

    ctx = context(directory, name="teacher", data=data)
    fit = FitConfig(epochs=1, max_steps=steps, global_batch=GLOBAL_BATCH, checkpoint_every_s=None)
    strategy = {"_target_": "horovod_jobs.strategy.allreduce.Allreduce", "tune": False}
    train.run(
        ctx,
        TrainStage(
            seed=0, model=_TEACHER, optimizer=_OPTIMIZER, schedule=_SCHEDULE, strategy=strategy, augment=False, fit=fit
        ),
    )
    return ctx.store.publish(ctx.staging, kind="model", fingerprint=ctx.fingerprint, meta={"stage": "teacher"})


def _run(system: str, directory: Path, turns: Turns, *, data: Any, teacher: Any, losses: dict[str, float]) -> None:
    from horovod_jobs.config import DistillStage, FitConfig, TrainStage
    from horovod_jobs.stages import distill, train

    try:
        turns.wait(system)
        total = turns.warmup + turns.rounds * turns.steps
        fit = FitConfig(epochs=1, max_steps=total, global_batch=GLOBAL_BATCH, checkpoint_every_s=None)
        strategy = {"_target_": "benchmarks.distill_cache.in_turn", "strategy": InTurn(turns, system)}
        common: dict[str, Any] = {"seed": 0, "model": _STUDENT, "optimizer": _OPTIMIZER, "schedule": _SCHEDULE,
                                  "strategy": strategy, "augment": False, "fit": fit}  # fmt: skip
        if system == "plain":
            result = train.run(context(directory, name=system, data=data), TrainStage(**common))
        else:
            node = {"_target_": "horovod_jobs.distillation.Distiller", "terms": _TERMS, "cache": system == "cached"}
            ctx = context(directory, name=system, data=data, inputs={"teacher": teacher})
            result = distill.run(ctx, DistillStage(**common, distiller=node))
        losses[system] = result.details["history"][0]["train_loss"]
    except BaseException as error:
        turns.fail(error)
        raise


def measure(*, warmup: int, steps: int, rounds: int, samples: int | None) -> dict[str, Any]:
    """Milliseconds a step of each system, one a round; the seconds to make the cache; the last losses."""
    from dataclasses import replace

    import torch

    from horovod_jobs.data.fashion_mnist import fashion_mnist
    from horovod_jobs.distillation.cache import teacher_outputs
    from horovod_jobs.predict import load_module

    data = replace(fashion_mnist(), validation=None)
    if samples is not None:
        data = replace(data, train=data.train.subset(torch.arange(samples)), digest="0" * 64)  # type: ignore[attr-defined]
    turns = Turns(warmup=warmup, steps=steps, rounds=rounds)
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as path:
        directory = Path(path)
        note("teacher")
        teacher = _teacher(directory, data=data, steps=10)
        note("cache")
        model = load_module(teacher, allow_targets=())
        start = time.perf_counter()
        _, _, made = teacher_outputs(
            context(directory, name="cache", data=data), teacher, model, device=torch.device("cpu")
        )
        cache_s = time.perf_counter() - start
        assert made
        note("steps")
        threads = [
            threading.Thread(target=_run, args=(system, directory, turns), name=system,
                             kwargs={"data": data, "teacher": teacher, "losses": losses})
            for system in SYSTEMS
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failed:
        raise RuntimeError("a system failed") from turns.failed
    return {"ms": turns.ms, "cache_s": cache_s, "samples": len(data.train), "train_loss": losses}


def main() -> None:
    """Measure and print."""
    import statistics

    args = parser(__doc__ or "").parse_args()
    size: dict[str, Any] = {"warmup": 3, "steps": 3, "rounds": 3, "samples": 2000}
    found = measure(**(size if args.quick else {"warmup": 10, "steps": 20, "rounds": 20, "samples": None}))
    ms = found["ms"]
    ratios = {system: paired(ms[system], ms["live"]) for system in SYSTEMS}
    over = {system: paired(ms[system], ms["plain"]) for system in SYSTEMS}
    rows = [[system, spread(ms[system], digits=2), str(ratios[system]), str(over[system])] for system in SYSTEMS]
    updates = -(-found["samples"] // GLOBAL_BATCH)
    saved_s = updates * statistics.median(a - b for a, b in zip(ms["live"], ms["cached"], strict=True)) / 1000
    pays = f"pays after {found['cache_s'] / saved_s:.1f} epochs" if saved_s > 0 else "does not pay here"
    text = (
        f"{table(['teacher', 'ms a step', '/ live', '/ plain'], rows)}\n\nMedian (smallest..largest) of {len(ms['live'])} rounds; a round "
        f"is the mean step of a block of each, one after the other. Fashion-MNIST, batch {GLOBAL_BATCH}, one process, teacher cnn_teacher, "
        f"student cnn_student. Making the cache over {found['samples']} samples took {found['cache_s']:.1f} s; an epoch of {updates} steps "
        f"saves {saved_s:.1f} s against the live teacher, so the cache {pays}. Train loss: live {found['train_loss']['live']:.5f}, "
        f"cached {found['train_loss']['cached']:.5f}."
    )
    conclude("The teacher's cache", text, figures={**found, "to_live": ratios, "to_plain": over}, args=args)


if __name__ == "__main__":
    main()
