"""Tables in narrow terminals: dates, ids and numbers stay whole, and columns that matter less are left out and named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from horovod_jobs.tables import print_table

COLUMNS = ["run", "status", "name", "started", "ranks", "stages", "time", "energy"]
ROWS = [
    ["20261128-012719-ab12", "done", "a job", "2026-11-28 01:27", "2", "10/10", "4 min 12 s", "0.847 Wh"],
    [
        "20261128-012720-cd34",
        "damaged",
        "/tmp/x/runs/20261128-012720-cd34/manifest.json is damaged (ValueError: no JSON)",
    ],
]


def shown(width: int, columns: list[str] = COLUMNS, rows: list[list[str]] = ROWS, **how: object) -> str:
    stream = io.StringIO()
    how = {"right": range(4, 8), "text": [2], "spare": ["ranks", "energy", "stages", "started"], **how}
    how["console"] = Console(file=stream, width=width, highlight=False)
    print_table(columns, rows, **how)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("width", [200, 100, 80, 60])
def test_what_is_read_as_one_thing_stays_in_one_line(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    first = next(line for line in text.splitlines() if "ab12" in line)
    for column, value in zip(COLUMNS, ROWS[0], strict=True):
        left_out = column in text.partition("left out at this width")[2].replace(",", " ").split()
        assert (value in first) != left_out or column == "ranks", (column, text)
    assert ("left out at this width: " in text) == (width < 150)
    for kept in ("20261128-012719-ab12", "done", "4 min 12 s"):
        assert kept in first


def test_the_columns_that_matter_least_go_first() -> None:
    rows = ROWS[:1]
    assert "left out at this width: ranks (--json" in shown(95, rows=rows)
    assert "2026-11-28 01:27" in shown(80, rows=rows)
    assert "left out at this width: started, ranks, stages, energy" in " ".join(shown(60, rows=rows).split())


def test_a_list_is_shown_one_entry_a_line_where_it_is_long() -> None:
    metrics = "accuracy 0.9139, worst_class_accuracy 0.7419"
    columns, rows = ["stage", "parameters", "metrics"], [["eval_model", "50,826", metrics]]
    assert metrics in shown(80, columns, rows, right=[1], text=[2], spare=["parameters"])
    narrow = shown(46, columns, rows, right=[1], text=[2], spare=["parameters"])
    assert "worst_class_accuracy 0.7419" in narrow
    assert "accuracy 0.9139," in narrow
    assert "left out at this width: parameters" in " ".join(narrow.split())
