"""Stages that do not need each other, side by side: each on a part of the ranks, and all together again afterwards.

Inside a part a stage is run as always (``lifecycle.make``). Between the parts goes a ``Beat``: requests to stop, failures, and the
news that only rank 0 writes down (manifest, events, scalars, log lines).
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from horovod_jobs.artifacts import Artifact
from horovod_jobs.comm.beat import Beat
from horovod_jobs.comm.world import World
from horovod_jobs.config import TrainStage, effective_global_batch
from horovod_jobs.console import LOGGER, Console, EventLog
from horovod_jobs.errors import BY_NAME, Interrupted, InterruptedByUser, JobError, WorldError
from horovod_jobs.footprint.part import for_part
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.lifecycle import Workplace, make, published
from horovod_jobs.planning import Planned, Prepared
from horovod_jobs.record import Record, first_line
from horovod_jobs.schedule import shares, shown
from horovod_jobs.spending import Spending
from horovod_jobs.tracking import NullTracker, Tracker

_PEERS_S = 10.0  # for the ranks of one part to come to the same error
_OTHERS_S = 60.0  # for the other parts to stop with a checkpoint, where one rank fails by itself

Tell = Callable[[list[Any]], None]


def side_by_side(
    steps: Sequence[Planned], prepared: Prepared, made: Mapping[str, Artifact], whole: Workplace, record: Record
) -> dict[str, Artifact]:
    """Collective. Run each step on its part of the ranks; gives the artifacts by stage.

    Raises:
        JobError: a stage failed, or a stop was asked for; the stages beside it were stopped with a checkpoint.
    """
    from horovod_jobs.comm.groups import Split

    world = whole.world
    parts = shares(world.size, len(steps))
    number = next(number for number, ranks in enumerate(parts) if world.rank in ranks)
    step, split = _for_part(steps[number], ranks=world.size), Split(world, parts)
    whole.log.info(
        "side by side: %s", ", ".join(f"{s.node.name} on {shown(r)}" for s, r in zip(steps, parts, strict=True))
    )
    asked = StopRequest()
    desk = _Desk(whole, record)
    beat = Beat(
        world, stopped=lambda: whole.stop.code, ask=lambda code: _note(asked, code), deliver=desk, interval_s=0.25
    )
    tell: Tell = desk if world.is_main else beat.post if split.mine.is_main else _nobody
    entry: dict[str, Any] = {}
    error: Exception | None = None
    with _relayed(tell if split.mine.is_main and not world.is_main else None):
        beat.start()
        try:
            make(step, prepared, made, _workplace(whole, split.mine, prepared, asked, tell, entry))
        except Exception as caught:
            error = caught
        _meet(beat, error, split.mine, world)
    error = error or beat.undelivered
    told = world.gather_json([_description(error), entry], name="side_by_side.outcome")
    split.close()
    outcomes = [_outcome(step, ranks, told) for step, ranks in zip(steps, parts, strict=True)]
    failed = next((outcome.name for outcome in outcomes if outcome.failed), None)
    for outcome in outcomes:
        if outcome.stopped and failed is not None:
            outcome.entry["reason"] = f"stopped with a checkpoint, because stage {failed} beside it failed"
        record.stage(outcome.name, **outcome.entry)
    world.main(record.write, name="manifest.write")
    if any(outcome.error for outcome in outcomes):
        _raise(outcomes, error, size=world.size)
    with world.agreed("side_by_side.visible"):
        return {step.node.name: _visible(step, outcome, whole) for step, outcome in zip(steps, outcomes, strict=True)}


def _for_part(step: Planned, *, ranks: int) -> Planned:
    """The step with the global batch that it has in the whole world: ``batch_per_rank`` would come to less in a part."""
    stage = step.node.config
    if not isinstance(stage, TrainStage) or stage.fit.batch_per_rank is None:
        return step
    global_batch = effective_global_batch(stage.fit, world_size=ranks)
    fit = replace(stage.fit, batch_per_rank=None, global_batch=global_batch)
    return replace(step, node=replace(step.node, config=replace(stage, fit=fit)))


def _workplace(
    whole: Workplace, part: World, prepared: Prepared, asked: StopRequest, tell: Tell, entry: dict[str, Any]
) -> Workplace:
    def record(name: str, **values: Any) -> None:
        entry.update(values)
        part.main(lambda: tell(["record", name, values]), name="stage.record")

    per_host = copy.copy(part)
    per_host.local_rank = part.host_rank  # One rank a host and part reads the meter.
    meter = for_part(prepared.meter, ranks=part.host_size, of=part.local_size)
    return replace(
        whole,
        world=part,
        stop=asked,
        spending=Spending(meter, per_host),
        # Bars of several stages would tear each other apart.
        console=Console(
            is_main=part.is_main,
            mode="none" if prepared.job.config.run.progress == "none" else "lines",
            above=whole.console,
        ),
        events=_Events(tell) if part.is_main else EventLog(None),
        tracker=_Scalars(tell) if part.is_main else NullTracker(),
        record=record,
    )


def _note(asked: StopRequest, code: int) -> None:
    asked.code = max(asked.code, code)


def _meet(beat: Beat, error: Exception | None, part: World, world: World) -> None:
    """Wait until every rank has ended its stage.

    Raises:
        Exception: this rank's own error, where the others of its part do not share it: they wait for it in vain.
    """
    beat.finish(failed=error is not None)
    others = set(range(world.size)) - set(part.ranks)
    began = time.monotonic()
    while not beat.over.wait(0.1):
        waited_s = time.monotonic() - began
        alone = error is not None and waited_s > _PEERS_S and not beat.ended(part.ranks)
        if error is not None and alone and (beat.ended(others) or waited_s > _OTHERS_S):
            raise error
    if beat.lost is not None:
        raise error or beat.lost


# --- news ---------------------------------------------------------------------------------------------------------------
class _Desk:
    """Rank 0's: keeps the news of its own stage and of the others'."""

    def __init__(self, whole: Workplace, record: Record) -> None:
        self._whole, self._record = whole, record
        self._lock = threading.Lock()

    def __call__(self, message: list[Any]) -> None:
        kind, *values = message
        with self._lock:
            if kind == "line":
                self._whole.log.log(values[0], "%s", values[1])
            elif kind == "event":
                self._whole.events.emit(values[0], **values[1])
            elif kind == "scalar":
                self._whole.tracker.scalar(values[0], values[1], step=values[2])
            else:
                self._record.stage(values[0], **values[1])
                self._record.write()


def _nobody(message: list[Any]) -> None:
    """Only a part's first rank has news."""


class _Events(EventLog):
    """Facts for rank 0, with the time at which they happened."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(None)
        self._tell = tell

    def emit(self, event: str, **fields: Any) -> None:
        self._tell(["event", event, {"time": round(time.time(), 3), **fields}])


class _Scalars(Tracker):
    """Scalars for rank 0's tracker."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def open(self, *, run_dir: Any, run_id: str, config: dict[str, Any]) -> None:
        """Rank 0 has opened it."""

    def scalar(self, name: str, value: float, *, step: int) -> None:
        self._tell(["scalar", name, value, step])

    def close(self, *, failed: bool = False) -> None:
        """Rank 0 closes it."""


class _Lines(logging.Handler):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(["line", record.levelno, self.format(record)])


@contextmanager
def _relayed(tell: Tell | None) -> Iterator[None]:
    """Send this rank's log lines to rank 0 as well."""
    if tell is None:
        yield
        return
    handler = _Lines(tell)
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)


# --- how it ended -------------------------------------------------------------------------------------------------------
class _Outcome:
    """How a part's stage ended, as all ranks know it."""

    def __init__(self, name: str, ranks: range, error: dict[str, str] | None, entry: dict[str, Any]) -> None:
        self.name, self.ranks, self.error, self.entry = name, ranks, error, entry

    @property
    def stopped(self) -> bool:
        """It was asked to stop, and can go on."""
        return self.error is not None and issubclass(BY_NAME.get(self.error["class"], WorldError), Interrupted)

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.stopped


def _description(error: Exception | None) -> dict[str, str] | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, JobError) else "".join(traceback.format_exception(error)[-3:]).strip()
    return {"class": type(error).__name__, "text": text, "line": first_line(error) or type(error).__name__}


def _outcome(step: Planned, ranks: range, told: Sequence[list[Any]]) -> _Outcome:
    error = next((told[rank][0] for rank in ranks if told[rank][0] is not None), None)
    entry = dict(told[ranks.start][1])
    outcome = _Outcome(step.node.name, ranks, error, entry)
    if error is not None and entry.get("status") != "ran":
        entry.update(status="failed" if outcome.failed else "pending", reason=error["line"])
    return outcome


def _raise(outcomes: Sequence[_Outcome], own: Exception | None, *, size: int) -> NoReturn:
    failed = next((outcome for outcome in outcomes if outcome.failed), None)
    if failed is None or failed.error is None:
        raise _all_stopped([outcome for outcome in outcomes if outcome.stopped])
    if own is not None and not isinstance(own, JobError):
        raise own
    cls = BY_NAME.get(failed.error["class"])
    where = f"stage {failed.name} ran on {shown(failed.ranks)} of {size}"
    if cls is None:
        raise WorldError(f"{where} and failed: {failed.error['text']}; see the log file of its ranks")
    raise cls(f"{failed.error['text']} ({where})")


def _all_stopped(outcomes: Sequence[_Outcome]) -> Interrupted:
    texts = [outcome.error["text"] for outcome in outcomes if outcome.error is not None]
    by_user = any(outcome.error and outcome.error["class"] == InterruptedByUser.__name__ for outcome in outcomes)
    return (InterruptedByUser if by_user else Interrupted)("; ".join(texts))


def _visible(step: Planned, outcome: _Outcome, whole: Workplace) -> Artifact:
    kind, path = step.node.config.OUTPUT, whole.store.path(step.node.config.OUTPUT, step.fingerprint)
    return published(whole.store, kind, step.fingerprint, path=str(path), rank=whole.world.rank)
