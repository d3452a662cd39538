"""``report.html``: one self-contained file, without scripts and without the network."""

from __future__ import annotations

from typing import Any

from horovod_jobs import formats
from horovod_jobs.report import drawing, plots, sharing, staleness, words
from horovod_jobs.report.collect import ReportData, StageView
from horovod_jobs.report.measures import measure
from horovod_jobs.report.table import Table, main_table, methods_note, with_figures

STATUS_WORDS = {"done": "done", "failed": "failed", "interrupted": "interrupted", "running": "not finished"}


def render_html(data: ReportData) -> str:
    """The whole page. The same run gives the same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("horovod_jobs.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {name: Markup(svg) for name, svg in _figures(data).items()}  # Ours, and escaped where they are drawn.
    return environment.get_template("report.html.j2").render(**_context(data), figures=figures)


def _figures(data: ReportData) -> dict[str, str]:
    final, reference = data.final, data.reference
    return {
        "graph": drawing.draw_graph([_box(stage, data) for stage in data.stages]),
        "curves": plots.learning_curves(data.curves) if data.curves else "",
        "shares": sharing.shares_over_time(sharing.of_stages(data.stages)),
        "staleness": staleness.histogram(staleness.of_stages(data.stages)),
        "classes": plots.per_class_change(reference, final) if final and reference else "",
        "trade_offs": plots.trade_offs(data.models),
        "confusion": plots.confusion(final) if final else "",
        "footprint": _footprint_figure(data),
    }


def _box(stage: StageView, data: ReportData) -> drawing.Box:
    entry, status = stage.entry, words.stage_status(stage, data)
    note = f"{entry['kind']} · {status}" if entry["kind"] != entry["name"] else status
    if entry["seconds"] is not None:
        note += f" · {formats.duration(entry['seconds'])}"
    return drawing.Box(entry["name"], note, status, list(entry["needs"].values()))


def _costly(data: ReportData) -> list[StageView]:
    return [stage for stage in data.stages if stage.entry["seconds"] is not None]


def _footprint_figure(data: ReportData) -> str:
    entries = [stage.entry for stage in _costly(data)]
    energy, energy_factor = formats.energy_unit(e["energy_kwh"] for e in entries)
    mass, mass_factor = formats.mass_unit(e["co2_kg"] for e in entries)
    money, money_factor = formats.money_unit(e["cost_usd"] for e in entries)

    def column(key: str, factor: float) -> list[float | None]:
        values: list[Any] = [entry[key] for entry in entries]  # type: ignore[literal-required]
        return [None if value is None else value * factor for value in values]

    return plots.footprint_bars(
        [entry["name"] for entry in entries],
        [
            ("Time, s", column("seconds", 1.0)),
            (f"Energy, {energy}", column("energy_kwh", energy_factor)),
            (f"CO2e, {mass}", column("co2_kg", mass_factor)),
            (f"Cost, {money}", column("cost_usd", money_factor)),
        ],
    )


def _context(data: ReportData) -> dict[str, Any]:
    manifest = data.manifest
    return {
        "data": data,
        "manifest": manifest,
        "status": STATUS_WORDS[data.status],
        "quality": measure(data.final.primary).title if data.final else "",
        "sentences": words.summary_sentences(data),
        "table": main_table(data) if data.models else None,
        "notes": [
            n
            for n in (_table_note(data), words.interval_note(data.models), methods_note(data), _latency_note(data))
            if n
        ],
        "curves_note": plots.CURVES_NOTE if any(curve.distilled for curve in data.curves) else "",
        "bytes_note": words.bytes_note(data),
        "footprint_note": words.footprint_note(data),
        "stage_table": _stage_table(data),
        "problems": [stage.problem for stage in data.stages if stage.problem],
        "command": words.command_line(data),
        "origin": words.origin_facts(data),
        "versions": {name: version or "not installed" for name, version in manifest["versions"].items()},
    }


def _table_note(data: ReportData) -> str:
    what = "Time, energy, CO2 and cost are" if data.metered else "Time is"
    text = f"{what} of the stage that made the model."
    return f"The shaded row is the final model, which the job led to. {text}" if len(data.models) > 1 else text


def _latency_note(data: ReportData) -> str:
    if not any(row.latency_ms for row in data.models):
        return ""
    config = next(
        (s.meta.get("config") for s in data.stages if s.entry["kind"] == "evaluate" and s.meta.get("config")), None
    )
    hardware = next((row.hardware for row in data.models if row.hardware), None)
    text = "Latency is the time of one call of the model, p50 the median and p95 the 95th percentile"
    if config and config.get("latency_runs"):
        threads = config.get("latency_threads")
        with_threads = "one thread" if threads == 1 else f"{threads} threads"
        text += f" of {config['latency_runs']} calls after warm-up, with {with_threads}"
    return text + (f", on {hardware}." if hardware else ".")


def _stage_table(data: ReportData) -> Table:
    """Every stage with its status and cost, a unit a column; a column in which nothing is known is left out."""
    entries = [stage.entry for stage in data.stages]
    energy, energy_factor = formats.energy_unit(e["energy_kwh"] for e in entries)
    mass, mass_factor = formats.mass_unit(e["co2_kg"] for e in entries)
    money, money_factor = formats.money_unit(e["cost_usd"] for e in entries)
    return with_figures(
        [
            ("Stage", [e["name"] for e in entries], False),
            ("Kind", [e["kind"] for e in entries], False),
            ("Status", [_status(stage, data) for stage in data.stages], False),
            ("Time", [formats.duration(e["seconds"]) for e in entries], True),
            (f"Energy, {energy}", [formats.scaled(e["energy_kwh"], energy_factor) for e in entries], True),
            (f"CO2e, {mass}", [formats.scaled(e["co2_kg"], mass_factor) for e in entries], True),
            (f"Cost, {money}", [formats.scaled(e["cost_usd"], money_factor) for e in entries], True),
            ("Artifact", [e["artifact"] or formats.DASH for e in entries], False),
        ]
    )


def _status(stage: StageView, data: ReportData) -> str:
    status = words.stage_status(stage, data)
    reason = stage.entry["reason"]
    return f"{status}: {reason}" if reason and status in ("failed", "skipped") else status
