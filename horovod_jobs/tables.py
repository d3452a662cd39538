"""Tables for a terminal of any width: what people read as one thing is never broken; columns that matter less give way to it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LEAST = 28  # Characters that a column of text gets, if its longest word needs so many; a longer word is broken.
_ANY = 100_000


def terminal() -> Console:
    """Standard output."""
    from rich.console import Console

    # A pipe has no width, whatever COLUMNS says of the terminal behind it; wide lines are then better than folded ones.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    text: Sequence[int] | None = None,
    spare: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table on ``terminal()``, or on another console.

    ``right``: columns that are set to the right. ``text``: those that may go on in a second line; all but the first where it is not
    given. ``spare``: what is left out in this order where the rest does not fit; a line under the table says so.
    """
    console = console or terminal()
    texts = set(range(1, len(columns)) if text is None else text)
    out: list[int] = []

    def made(least: bool) -> Table:
        kept = [i for i in range(len(columns)) if i not in out]
        cells = [[_least(row[i]) if least and i in texts else row[i] for i in kept if i < len(row)] for row in rows]
        return _table(
            [columns[i] for i in kept], cells, right=[i in right for i in kept], text=[i in texts for i in kept]
        )

    if _width(console, made(False)) > console.width:
        # A list is read best with one entry a line.
        rows = [[cell.replace(", ", ",\n") if i in texts else cell for i, cell in enumerate(row)] for row in rows]
        for name in spare:
            if _width(console, made(True)) <= console.width:
                break
            out.append(columns.index(name))
    console.print(made(False))
    if out:
        console.print(f"left out at this width: {', '.join(columns[i] for i in sorted(out))} (--json has all)")


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[bool], text: Sequence[bool]
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, is_right, is_text in zip(columns, right, text, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _least(cell: str) -> str:
    """As much of a text as must stay in one line."""
    return max(re.split(r"\n" if ",\n" in cell else r"\s+", cell), key=len)[:_LEAST]


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(width=_ANY)).maximum
