"""The main table, independent of how it is shown: columns, and a row of texts for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from horovod_jobs import formats
from horovod_jobs.report import measures
from horovod_jobs.report.collect import ModelRow, ReportData
from horovod_jobs.runtimes import runtime_of


@dataclass(frozen=True)
class Table:
    """Texts only. ``numeric`` says which columns are figures, to be set to the right."""

    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]


def main_table(data: ReportData) -> Table:
    """Each evaluated model: quality, size, latency, cost of the stage that made it. Columns without figures go."""
    models = data.models
    energy, energy_factor = formats.energy_unit(row.energy_kwh for row in models)
    mass, mass_factor = formats.mass_unit(row.co2_kg for row in models)
    money, money_factor = formats.money_unit(row.cost_usd for row in models)
    batches = sorted({batch for row in models for batch in row.latency_ms}, key=int)
    columns: list[tuple[str, list[str], bool]] = [
        ("Model", [row.label for row in models], False),
        *measures.columns(models),
        ("Worst class", [_worst(row) for row in models], False),
        ("Parameters", [formats.integer(row.parameters) for row in models], True),
        ("Model file", [formats.size(row.file_bytes) for row in models], True),
        ("Runs in", [runtime_of(row.format) for row in models], False),
        *((f"Batch {b}, ms (p50 / p95)", [_latency(row, b) for row in models], True) for b in batches),
        ("Made in", [formats.duration(row.seconds) for row in models], True),
        (f"Energy, {energy}", [formats.scaled(row.energy_kwh, energy_factor) for row in models], True),
        (f"CO2e, {mass}", [formats.scaled(row.co2_kg, mass_factor) for row in models], True),
        (f"Cost, {money}", [formats.scaled(row.cost_usd, money_factor) for row in models], True),
    ]
    return with_figures(columns)


def with_figures(columns: Sequence[tuple[str, list[str], bool]]) -> Table:
    """A table of the columns (title, texts, whether they are figures) in which something is known."""
    shown = [column for column in columns if any(text != formats.DASH for text in column[1])]
    return Table(
        columns=[name for name, _, _ in shown],
        rows=[list(cells) for cells in zip(*(cells for _, cells, _ in shown), strict=True)],
        numeric=[numeric for _, _, numeric in shown],
    )


def methods_note(data: ReportData) -> str:
    """How the energies of the table were found."""
    methods = list(dict.fromkeys(row.method for row in data.models if row.method and row.energy_kwh is not None))
    return "Energy of the stage that made the model: " + " / ".join(methods) + "." if methods else ""


def _worst(row: ModelRow) -> str:
    value = row.metrics.get("worst_class_accuracy")
    if value is None:
        return formats.DASH
    return formats.percent(value, digits=1) + (f" ({row.worst_class})" if row.worst_class else "")


def _latency(row: ModelRow, batch: str) -> str:
    timing = row.latency_ms.get(batch)
    return f"{formats.milliseconds(timing['p50'])} / {formats.milliseconds(timing['p95'])}" if timing else formats.DASH
