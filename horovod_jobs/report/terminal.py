"""The main table on the console, and what a job prints at its end."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from horovod_jobs.report.collect import ReportData, collect
from horovod_jobs.report.table import Table, main_table, methods_note

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def render_terminal_table(data: ReportData, *, width: int | None = None, color: bool = False) -> str:
    """The main table as text, at most ``width`` wide (None: the terminal's, or 160); empty without models."""
    if not data.models:
        return ""
    from rich.console import Console
    from rich.text import Text

    if width is None:
        width = shutil.get_terminal_size((160, 40)).columns if sys.stdout.isatty() else 160
    stream = io.StringIO()
    console = Console(
        file=stream, width=max(40, width), force_terminal=color, color_system="standard" if color else None
    )
    console.print(Text(data.title, style="bold"))
    for part in _tables(main_table(data), width):
        console.print(part)
    if note := methods_note(data):
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _tables(table: Table, width: int) -> list[RichTable]:
    """A row a model where that fits, otherwise a column a model, otherwise a list for each model."""
    from rich.table import Table as RichTable
    from rich.text import Text

    names = [name.replace(" / ", "/") for name in table.columns]
    widest = [
        max(len(name.split(",")[0]) + 1, *map(len, cells))
        for name, cells in zip(names, zip(*table.rows, strict=True), strict=True)
    ]
    across, down = sum(widest) + 3 * len(widest), 26 + sum(max(12, *map(len, row[1:])) + 3 for row in table.rows)
    if across <= width + 20:
        shown = RichTable()
        for name, numeric in zip(names, table.numeric, strict=True):
            shown.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))  # Text, not markup: a label may have brackets in it.
        return [shown]
    groups = [table.rows] if down <= width else [[row] for row in table.rows]
    shown_groups = []
    for rows in groups:
        shown = RichTable()
        shown.add_column(Text(names[0]))
        for row in rows:
            shown.add_column(Text(row[0]), justify="right", overflow="fold")
        for i, name in enumerate(names[1:], start=1):
            shown.add_row(Text(name), *(Text(row[i]) for row in rows))
        shown_groups.append(shown)
    return shown_groups


def summary(run_dir: str | Path, *, width: int | None = None, color: bool = False) -> str:
    """What a job prints at its end: the table (see ``render_terminal_table``), and where the report is."""
    run_dir = Path(run_dir)
    data = collect(run_dir)
    page = run_dir / "report.html"
    lines = [render_terminal_table(data, width=width, color=color)]
    lines.append(
        f"Report: {page}" if page.is_file() else f"Run: {run_dir} (horovod-runs report {run_dir.name} makes a report)"
    )
    return "\n".join(line for line in lines if line)
