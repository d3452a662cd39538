"""Gather a run's figures: the manifest, and of each stage the artifact in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.artifacts import Artifact, open_artifact
from horovod_jobs.errors import ArtifactError
from horovod_jobs.manifest import Manifest, StageEntry
from horovod_jobs.report.weights import weights_bytes
from horovod_jobs.runtimes import FORMATS


@dataclass(frozen=True)
class StageView:
    """A stage of the run: its entry in the manifest and, where it could be read, its artifact."""

    entry: StageEntry
    artifact: Artifact | None = None
    problem: str | None = None

    @property
    def meta(self) -> Mapping[str, Any]:
        """The artifact's record, empty without one."""
        return self.artifact.meta if self.artifact else {}


@dataclass(frozen=True)
class ModelRow:
    """One evaluated model: what it is worth, and what the stage that made it cost."""

    label: str
    stage: str  # the stage that made it
    kind: str  # that stage's kind, e.g. "distill"
    format: str  # "torch" or "onnx"
    split: str
    samples: int | None
    metrics: Mapping[str, float]
    parameters: int | None
    file_bytes: int | None  # of the model's file
    weights_bytes: int | None  # of the numbers in it
    latency_ms: Mapping[str, Mapping[str, float]]
    seconds: float | None
    energy_kwh: float | None
    co2_kg: float | None
    cost_usd: float | None
    method: str | None
    worst_class: str | None  # "Shirt"; "class 2" where names are numbers
    class_names: list[str]
    per_class: list[float]
    confusion: list[list[int]]
    lineage: list[str]  # refs of the artifacts it descends from, itself last
    is_teacher: bool = False
    ref: str = ""
    path: Path | None = None  # of its artifact, where that could be read
    hardware: str | None = None  # of the evaluation, where its latency was measured
    primary: str = "accuracy"  # the figure that models of this task are compared by

    @property
    def score(self) -> float | None:
        """The primary figure: the fraction classified correctly, the AUC, or what the task says."""
        return self.metrics.get(self.primary)


@dataclass(frozen=True)
class Curve:
    """What one training stage recorded by epoch; ``label`` is the name of its model in the tables."""

    stage: str
    history: list[dict[str, Any]]
    label: str
    distilled: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows."""

    title: str
    run_dir: Path
    manifest: Manifest
    config: dict[str, Any]
    config_text: str
    stages: list[StageView]
    models: list[ModelRow]
    curves: list[Curve]
    footprint: Mapping[str, Any] = field(default_factory=dict)  # carbon intensity, country, prices, hardware
    license: str = "unknown"  # of the model, for its card

    @property
    def metered(self) -> bool:
        """Whether the energy of any stage is known."""
        return any(stage.entry["energy_kwh"] is not None for stage in self.stages)

    @property
    def status(self) -> str:
        """The run's status. A report that is a stage of the run is written just before the end, and says ``done``."""
        status = self.manifest["status"]
        others = [s.entry["status"] for s in self.stages if s.entry["kind"] != "report"]
        over = status == "running" and set(others) <= {"ran", "reused", "skipped"} and len(others) < len(self.stages)
        return "done" if over else status

    @property
    def final(self) -> ModelRow | None:
        """The model that the most stages led to; the later of two equals."""
        return max(enumerate(self.models), key=lambda pair: (len(pair[1].lineage), pair[0]))[1] if self.models else None

    @property
    def reference(self) -> ModelRow | None:
        """The teacher, or without one the first model; None where that is the final model itself."""
        row = next((row for row in self.models if row.is_teacher), self.models[0] if self.models else None)
        return None if row is self.final else row


def collect(run_dir: str | Path, *, report_stage: str | None = None) -> ReportData:
    """Read a run. A stage whose artifact is gone keeps its manifest figures and says so.

    ``report_stage`` names the report stage whose needs choose and label the models; None takes the run's first one.

    Raises:
        ArtifactError: there is no readable manifest.
    """
    run_dir = Path(run_dir)
    manifest = manifests.read(run_dir)
    config_text = _read_text(run_dir / "config.yaml")
    config = _parse_config(config_text)
    store = manifests.store_of(run_dir, manifest)
    stages = [_stage(entry, store) for entry in manifest["stages"]]
    report = next(
        (s.entry for s in stages if s.entry["kind"] == "report" and report_stage in (None, s.entry["name"])), None
    )
    finder = _Finder(store, stages, run_dir)
    models = [row for label, view in _evaluations(stages, report, finder) if (row := _row(label, view, finder))]
    labels = {row.stage: row.label for row in reversed(models)}
    curves = [
        Curve(name, history, labels.get(name, name), s.entry["kind"] == "distill")
        for s in stages
        if (history := _history(s)) and (name := s.entry["name"])
    ]
    wanted = (config.get("stages") or {}).get(report["name"] if report else "", {})
    return ReportData(
        title=str(wanted.get("title") or config.get("title") or manifest["name"]),
        license=str(wanted.get("license") or "unknown"),
        run_dir=run_dir,
        manifest=manifest,
        config=config,
        config_text=config_text,
        stages=stages,
        models=models,
        curves=curves,
        footprint=next((d for s in stages if (d := (s.meta.get("footprint") or {}).get("details"))), {}),
    )


class _Finder:
    """Finds artifacts by reference in the store, and by the paths that external needs name."""

    def __init__(self, store: Path, stages: list[StageView], run_dir: Path) -> None:
        self._store = store
        self._known = {s.artifact.ref: s.artifact for s in stages if s.artifact}
        self.stage_of = {s.entry["artifact"]: s.entry for s in stages if s.entry["artifact"]}
        self.teachers = {
            (s.meta.get("inputs") or {}).get("teacher", {}).get("ref") for s in stages if s.meta.get("inputs")
        } - {None}
        self._external = [Path(source) for s in stages for source in s.entry["needs"].values() if "/" in source]

    def find(self, ref: str) -> Artifact | None:
        if ref not in self._known:
            for path in [self._store / ref, *(p for p in self._external if p.name == ref)]:
                try:
                    self._known[ref] = open_artifact(path, verify=False)
                    break
                except ArtifactError:
                    continue
        return self._known.get(ref)

    def external(self, path: str) -> StageView | None:
        try:
            artifact = open_artifact(path, verify=False)
        except ArtifactError:
            return None
        entry = {"name": artifact.meta.get("stage", path), "kind": artifact.meta.get("stage_kind", artifact.kind)}
        figures = {key: artifact.meta.get(key) for key in ("metrics", "parameters", "model_bytes", "latency_ms")}
        return StageView({**entry, **figures, "artifact": artifact.ref, "needs": {}, "status": "reused"}, artifact)  # type: ignore[typeddict-item]

    def lineage(self, ref: str) -> list[str]:
        """References of everything an artifact descends from, in order, itself last."""
        seen: dict[str, None] = {}

        def visit(current: str) -> None:
            artifact = self.find(current)
            for given in (artifact.meta.get("inputs") or {}).values() if artifact else ():
                if given["ref"] not in seen and given["ref"] != current:
                    visit(given["ref"])
            seen[current] = None

        visit(ref)
        return list(seen)


def _stage(entry: StageEntry, store: Path) -> StageView:
    if not entry["artifact"]:
        return StageView(entry)
    try:
        return StageView(entry, open_artifact(store / entry["artifact"], verify=False))
    except ArtifactError as error:
        return StageView(entry, problem=str(error))


def _evaluations(
    stages: list[StageView], report: StageEntry | None, finder: _Finder
) -> list[tuple[str | None, StageView]]:
    """The evaluations to show, with the label the report stage gives them; all of the run's where it names none."""
    by_name = {s.entry["name"]: s for s in stages}
    chosen: list[tuple[str | None, StageView]] = []
    for role, source in (report["needs"] if report else {}).items():
        view = finder.external(source) if "/" in source else by_name.get(source)
        if view is not None and view.artifact is not None and view.artifact.kind == "evaluation":
            chosen.append((role, view))
    return chosen or [(None, s) for s in stages if s.artifact is not None and s.artifact.kind == "evaluation"]


def _row(label: str | None, view: StageView, finder: _Finder) -> ModelRow | None:
    given = (view.meta.get("inputs") or {}).get("model")
    if not given:
        return None
    ref = given["ref"]
    made, entry = finder.find(ref), finder.stage_of.get(ref)
    meta: Mapping[str, Any] = made.meta if made else {}
    cost: Mapping[str, Any] = entry or meta.get("footprint") or {}
    details = view.meta.get("details") or {}
    confusion = details.get("confusion") or []
    form = str(details.get("format") or ("onnx" if given.get("kind") == "quantized" else "torch"))
    file = FORMATS[form].file if form in FORMATS else None
    file = file if made and file in made.files else None
    file_bytes = made.files[file]["bytes"] if made and file else view.entry["model_bytes"]
    stage = str(meta.get("stage") or given.get("stage"))
    return ModelRow(
        label=label or stage,
        stage=entry["name"] if entry else stage,
        kind=str(entry["kind"] if entry else meta.get("stage_kind", given.get("kind", ""))),
        format=form,
        split=str((view.meta.get("config") or {}).get("split", details.get("split", "test"))),
        samples=sum(map(sum, confusion)) or details.get("count") or details.get("samples"),
        metrics=view.entry["metrics"] or {},
        parameters=_first(view.entry["parameters"], meta.get("parameters")),
        file_bytes=file_bytes,
        weights_bytes=weights_bytes(made.path / file) if made and file else None,
        latency_ms=dict(sorted((view.entry["latency_ms"] or {}).items(), key=lambda item: int(item[0]))),
        seconds=_first(cost.get("seconds"), meta.get("seconds")),
        energy_kwh=cost.get("energy_kwh"),
        co2_kg=cost.get("co2_kg"),
        cost_usd=cost.get("cost_usd"),
        method=cost.get("footprint_method") or cost.get("method"),
        worst_class=_name_of(details.get("worst_class"), details.get("class_names") or []),
        class_names=[str(name) for name in details.get("class_names") or []],
        per_class=[
            float(value) if value is not None else float("nan") for value in details.get("per_class_accuracy") or []
        ],
        confusion=confusion,
        lineage=finder.lineage(ref),
        is_teacher=ref in finder.teachers,
        ref=ref,
        path=made.path if made else None,
        hardware=(details.get("latency") or {}).get("cpu")
        or (view.meta.get("footprint") or {}).get("details", {}).get("cpu_model"),  # Where older ones have it.
        primary=str(details.get("primary", "accuracy")),
    )


def _history(stage: StageView) -> list[dict[str, Any]]:
    return list((stage.meta.get("details") or {}).get("history") or [])


def _name_of(worst: Any, names: list[str]) -> str | None:
    if isinstance(worst, int) and not isinstance(worst, bool) and 0 <= worst < len(names):
        worst = names[worst]
    if worst is None:
        return None
    return f"class {worst}" if str(worst).isdigit() else str(worst)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _parse_config(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    # Through JSON, so that dates and other YAML types become plain values.
    return json.loads(json.dumps(value, default=str)) if isinstance(value, dict) else {}
