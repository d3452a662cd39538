"""``horovod-runs watch``: a run as it goes, from its files, or from the JSON lines of a job that runs elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_jobs import formats
from horovod_jobs import manifest as manifests
from horovod_jobs.errors import WorldError
from horovod_jobs.living import Sightings

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SILENT_AFTER_BEATS = 5  # A rank that has missed so many signs of life is shown as silent.
_METRICS = ("train_loss", "validation_loss", "validation_accuracy", "validation_auc")


@dataclass
class StageView:
    """What is known of a stage."""

    name: str
    kind: str = ""
    status: str = "pending"
    done: int = 0
    total: int = 0
    note: str = ""
    seconds: float | None = None
    energy_kwh: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class RankView:
    """A rank's last sign of life."""

    rank: int
    host: str
    doing: str
    age_s: float
    alive: bool


@dataclass
class RunView:
    """A run at one moment. ``status`` is the manifest's, or ``running`` where only lines are seen; see ``living`` for ``gone``."""

    run: str = ""
    name: str = ""
    status: str = "running"
    gone: bool = False
    seconds: float | None = None
    size: int | None = None
    error: str | None = None
    stages: dict[str, StageView] = field(default_factory=dict)
    ranks: list[RankView] = field(default_factory=list)
    silent: list[int] | None = None  # where only lines are seen: what rank 0 last told

    def stage(self, name: str) -> StageView:
        return self.stages.setdefault(name, StageView(name))

    def take(self, event: dict[str, Any]) -> None:
        """Learn from one line of ``events.jsonl``."""
        kind = event.get("event")
        if kind == "job_end":
            self.status = str(event.get("status", "ended"))
        if kind == "ranks":
            self.size, self.silent = int(event["size"]), [int(rank) for rank in event["silent"]]
        if "stage" not in event:
            return
        stage = self.stage(str(event["stage"]))
        if kind == "stage_start":
            stage.kind, stage.status = str(event.get("kind", "")), "running"
        elif kind == "progress":
            stage.done, stage.total, stage.note = int(event["done"]), int(event["total"]), str(event.get("note", ""))
        elif kind == "epoch":
            stage.metrics = {key: event[key] for key in _METRICS if key in event}
        elif kind == "checkpoint":
            stage.energy_kwh = event.get("energy_kwh", stage.energy_kwh)
        elif kind == "stage_end":
            stage.status, stage.seconds = "ran", event.get("seconds")

    @property
    def ranks_alive(self) -> int:
        if self.silent is not None and self.size is not None:
            return self.size - len(self.silent)
        return sum(rank.alive for rank in self.ranks)

    @property
    def energy_kwh(self) -> float | None:
        known = [stage.energy_kwh for stage in self.stages.values() if stage.energy_kwh is not None]
        return sum(known) if known else None


def of_directory(run_dir: Path, sightings: Sightings | None = None) -> RunView:
    """A run from its manifest, its events and the ranks' signs of life. ``sightings``: those of who looks again and again.

    Raises:
        ArtifactError: there is no manifest, or it is damaged.
    """
    manifest = manifests.read(run_dir)
    view = RunView(manifest["run_id"], manifest["name"], manifest["status"], size=manifest["world"]["size"])
    view.error = manifest["error"]
    for entry in manifest["stages"]:
        view.stages[entry["name"]] = StageView(entry["name"])
    for event in events(run_dir):
        view.take(event)
    for entry in manifest["stages"]:  # After the events: a resumed run's file may tell of an earlier try.
        stage = view.stages[entry["name"]]
        stage.kind, stage.status = entry["kind"], entry["status"]
        stage.seconds = entry["seconds"] if entry["seconds"] is not None else stage.seconds
        if entry["status"] in ("ran", "reused"):
            stage.energy_kwh = entry["energy_kwh"] if entry["status"] == "ran" else None
    view.status = manifest["status"]
    view.seconds = manifest["totals"].get("seconds")
    now = time.monotonic()
    seen = Sightings(run_dir) if sightings is None else sightings
    seen.look(now)
    _take_signs(view, run_dir, seen, now)
    view.gone = view.status == "running" and (seen.gone_at_once() if sightings is None else seen.gone(now))
    return view


def events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events so far; a last line that is still being written is left out."""
    try:
        text = (run_dir / "events.jsonl").read_text(encoding="utf-8")
    except OSError:
        return
    yield from lines_to_events(text.splitlines())


def lines_to_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events among lines; a launcher may have written a rank's number before them, and other lines lie between."""
    for line in lines:
        start = line.find("{")
        if start < 0:
            continue
        try:
            event = json.loads(line[start:])
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def _take_signs(view: RunView, run_dir: Path, seen: Sightings, now: float) -> None:
    started = run_dir.stat().st_ctime
    ranks = range(view.size or 0)
    for rank in [*ranks, *sorted(set(seen.signs) - set(ranks))]:  # the others are parameter servers
        sign = seen.signs.get(rank)
        if sign is None:
            view.ranks.append(RankView(rank, "", "no sign of life yet", time.time() - started, alive=False))
            continue
        age_s = seen.age_s(rank, now)
        doing = f"{sign['doing'] or 'at work'}"
        if sign["waiting_in"] and sign["waiting_s"] >= sign["every_s"]:
            doing += f", waiting in {sign['waiting_in']} for {sign['waiting_s']:.0f} s"
        over = sign["ended"] or view.status != "running"
        alive = over or age_s < SILENT_AFTER_BEATS * sign["every_s"]
        view.ranks.append(RankView(rank, sign["host"], "ended" if over else doing, age_s, alive))
        if sign["doing"] in view.stages and not over:
            stage = view.stages[sign["doing"]]
            if sign["done"] >= stage.done:
                stage.done, stage.total, stage.note = sign["done"], sign["total"], sign["note"]


def to_json(view: RunView) -> dict[str, Any]:
    """For programs."""
    return {
        "run_id": view.run,
        "name": view.name,
        "status": view.status,
        "gone": view.gone,
        "energy_kwh": view.energy_kwh,
        "ranks_alive": view.ranks_alive,
        "ranks_silent": [rank.rank for rank in view.ranks if not rank.alive] if view.silent is None else view.silent,
        "ranks": [vars(rank) for rank in view.ranks],
        "stages": [vars(stage) for stage in view.stages.values()],
    }


def render(view: RunView) -> RenderableType:
    """A run as tables."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = [f"{view.run}  {view.name}".strip(), "gone" if view.gone else view.status]
    if view.size and view.status == "running":
        head += [f"{view.ranks_alive} of {len(view.ranks) or view.size} ranks alive"]
        head += [f"silent: {', '.join(map(str, view.silent))}"] if view.silent else []
    head += [f"{formats.energy(view.energy_kwh)} so far"] if view.energy_kwh is not None else []
    stages = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "kind", "status", "step", "now", "last epoch", "time", "energy"):
        stages.add_column(
            title,
            justify="right" if title in ("step", "time", "energy") else "left",
            no_wrap=title not in ("now", "last epoch"),
            overflow="fold",
        )
    for stage in view.stages.values():
        metrics = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in stage.metrics.items())
        running = stage.status == "running"
        step = f"{stage.done}/{stage.total}" if running and stage.total else ""
        stages.add_row(stage.name, stage.kind, Text(stage.status, "bold" if running else ""), step,
                       stage.note if running else "", metrics, formats.duration(stage.seconds),
                       formats.energy(stage.energy_kwh))  # fmt: skip
    parts: list[RenderableType] = [Text("  ".join(part for part in head if part)), stages]
    if view.ranks and view.status == "running":
        ranks = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("rank", "host", "doing", "last seen"):
            ranks.add_column(title)
        for rank in view.ranks:
            seen = f"{rank.age_s:.0f} s ago" + ("" if rank.alive else ", SILENT")
            ranks.add_row(str(rank.rank), rank.host, rank.doing, Text(seen, "" if rank.alive else "bold red"))
        parts.append(ranks)
    if view.error:
        parts.append(Text(f"error: {view.error}"))
    return Group(*parts)


def watch(run_dir: Path, *, console: Console, every_s: float = 1.0, once: bool = False, as_json: bool = False) -> None:
    """Show a run until it ends; as JSON, a line each time something has changed.

    Raises:
        WorldError: the run is gone.
    """
    if once or as_json:
        view = _watch_changes(run_dir, console=console, every_s=every_s, once=once, as_json=as_json)
    else:
        view = _watch_live(run_dir, console=console, every_s=every_s)
    if view.gone:
        raise WorldError(
            f"run {view.run} is gone: no rank gives signs of life and no process of this host holds its lock, though its manifest says "
            "running; it was killed outright, or its host is down; the same command goes on from the last checkpoint"
        )


def _watch_changes(run_dir: Path, *, console: Console, every_s: float, once: bool, as_json: bool) -> RunView:
    shown, sightings = None, None if once else Sightings(run_dir)
    while True:
        view = of_directory(run_dir, sightings)
        value = to_json(view)
        stable = {**value, "ranks": [{**rank, "age_s": 0} for rank in value["ranks"]]}
        if stable != shown:
            print(json.dumps(value, ensure_ascii=False), flush=True) if as_json else console.print(render(view))
            shown = stable
        if once or view.gone or view.status != "running":
            return view
        time.sleep(every_s)


def _watch_live(run_dir: Path, *, console: Console, every_s: float) -> RunView:
    from rich.live import Live

    sightings = Sightings(run_dir)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            view = of_directory(run_dir, sightings)
            live.update(render(view), refresh=True)
            if view.gone or view.status != "running":
                return view
            time.sleep(every_s)


def watch_lines(lines: Iterable[str], *, console: Console, as_json: bool = False) -> bool:
    """Show a run from the lines that a job with ``run.progress=json`` writes, until they end; False where there were none."""
    from rich.live import Live

    view, seen = RunView("(from standard input)"), False
    if as_json:
        for event in lines_to_events(lines):
            view.take(event)
            seen = True
            print(json.dumps(to_json(view), ensure_ascii=False), flush=True)
        return seen
    with Live(console=console, auto_refresh=False) as live:
        for event in lines_to_events(lines):
            view.take(event)
            seen = True
            live.update(render(view), refresh=True)
    return seen


def standard_input() -> Iterator[str]:
    """Lines as they come."""
    yield from iter(sys.stdin.readline, "")
