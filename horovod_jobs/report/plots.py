"""The report's plots, as inline SVG by matplotlib.

Okabe-Ito colours, and never colour alone: markers and line styles differ.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from horovod_jobs import formats
from horovod_jobs.report.measures import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from horovod_jobs.report.collect import Curve, ModelRow

# Okabe and Ito 2008, "Color Universal Design"; its yellow is left out, as it does not show on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 1040 / 96  # inches: the text's width in style.css, so that plots end where the rules do
CURVES_NOTE = (
    "A distilled model's training loss is what its distiller adds up (T² times the divergence from the teacher at temperature T, "
    "say): it is no cross-entropy, and has a panel of its own."
)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def _svg(name: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw on a figure of ``size`` (inches), in our style only: same input, same text; ids unique within a page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace(
        "<svg ", f'<svg class="plot" style="max-width:{size[0] * 96:.0f}px" role="img" aria-label="{escape(alt)}" ', 1
    )


def learning_curves(curves: Sequence[Curve]) -> str:
    """Training losses and the task's validation figure by epoch, a line a stage; empty text without records."""
    recorded = dict.fromkeys(key for curve in curves for entry in curve.history for key in entry)
    figures = [key for key in recorded if key.startswith("validation_") and key != "validation_loss"]
    labels = [curve.label for curve in curves]
    numbered = list(enumerate(curves))
    panels = [
        ("train_loss", "Training loss", 1.0, [(i, c) for i, c in numbered if not c.distilled]),
        ("train_loss", "Training loss, distillation", 1.0, [(i, c) for i, c in numbered if c.distilled]),
        *(
            (key, f"Validation {by.noun}{', %' if by.percent else ''}", by.factor, numbered)
            for key in figures
            if (by := measure(key.removeprefix("validation_")))
        ),
    ]
    panels = [panel for panel in panels if any(_points(curve, panel[0]) for _, curve in panel[3])]
    if not panels:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        lines: dict[int, Any] = {}
        for axis, (key, title, factor, shown) in zip(axes, panels, strict=True):
            for i, curve in shown:
                points = _points(curve, key)
                every = max(1, len(points) // 8)
                (lines[i],) = axis.plot(
                    [epoch for epoch, _ in points],
                    [value * factor for _, value in points],
                    color=COLOURS[i % 7],
                    linestyle=LINES[i % 7],
                    marker=MARKERS[i % 7],
                    markevery=every,
                )
            axis.set(title=title, xlabel="Epoch")
            epochs = [epoch for _, curve in shown for epoch, _ in _points(curve, key)]
            if max(epochs) == min(epochs):  # One point has no width, and ticks between epochs would mean nothing.
                axis.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        drawn = sorted(lines)
        figure.legend(
            [lines[i] for i in drawn],
            [_short(labels[i], length=40) for i in drawn],
            loc="outside lower center",
            ncols=min(4, len(drawn)),
        )

    return _svg("curves", "Learning curves of " + ", ".join(labels), (WIDTH, 3.9), draw)


def _points(curve: Curve, key: str) -> list[tuple[float, float]]:
    found = [(entry.get("epoch", i + 1), entry.get(key)) for i, entry in enumerate(curve.history)]
    return [(epoch, value) for epoch, value in found if isinstance(value, int | float) and math.isfinite(value)]


def per_class_change(before: ModelRow, after: ModelRow) -> str:
    """Accuracy of each class for two models, the largest loss on top; empty text where they cannot be compared."""
    if not before.per_class or before.class_names != after.class_names or len(before.per_class) != len(after.per_class):
        return ""
    changes = sorted(
        ((b - a, name, a, b) for name, a, b in zip(before.class_names, before.per_class, after.per_class, strict=True)),
        key=lambda change: change[0] if math.isfinite(change[0]) else math.inf,
    )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        rows = range(len(changes))
        for y, (change, _, a, b) in zip(rows, changes, strict=True):
            axis.plot([100 * a, 100 * b], [y, y], color="#555555", linewidth=1.4, zorder=1)
            axis.annotate(
                formats.points(change),
                (100 * max(a, b), y),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
        axis.scatter(
            [100 * c[2] for c in changes],
            rows,
            s=58,
            marker="o",
            facecolor="white",
            edgecolor=COLOURS[0],
            linewidth=1.8,
            label=before.label,
            zorder=2,
        )
        axis.scatter(
            [100 * c[3] for c in changes], rows, s=58, marker="D", color=COLOURS[1], label=after.label, zorder=3
        )
        axis.set_yticks(list(rows), [_short(c[1]) for c in changes])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("Accuracy of the class, %, and the change in percentage points")
        figure.legend(loc="outside upper left", ncols=2)

    return _svg(
        "classes", f"Accuracy by class, {before.label} and {after.label}", (WIDTH, 1.6 + 0.34 * len(changes)), draw
    )


def trade_offs(models: Sequence[ModelRow]) -> str:
    """The primary figure against size and against latency at the smallest batch; empty text with fewer than two points."""
    by = measure(models[-1].primary) if models else measure("accuracy")
    models = [row for row in models if row.primary == by.key]
    batch = next((key for row in models for key in row.latency_ms), "")
    sizes = [(row, float(row.file_bytes or 0)) for row in models]
    times = [(row, float(row.latency_ms.get(batch, {}).get("p50", 0))) for row in models]
    panels = [
        (title, [(i, x, row) for i, (row, x) in enumerate(values) if x > 0 and row.score is not None])
        for title, values in (
            ("Size of the model's file, bytes", sizes),
            (f"Median latency at batch {batch}, ms", times),
        )
    ]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, points) in zip(axes, panels, strict=True):
            _scatter(axis, [(i, x, by.factor * (row.score or 0)) for i, x, row in points])
            axis.set_xlabel(title)
        axes[0].set_ylabel(by.axis)
        figure.draw_without_rendering()  # Labels are placed in pixels, which are known only after the layout.
        for axis, (_, points) in zip(axes, panels, strict=True):
            _label_points(axis, [(x, by.factor * (row.score or 0), row.label) for _, x, row in points])

    return _svg("tradeoffs", f"{by.title} against size and latency", (WIDTH, 3.9), draw)


def _scatter(axis: Axes, points: list[tuple[int, float, float]]) -> None:
    values = [x for _, x, _ in points]
    low, high = min(values), max(values)
    for i, x, accuracy in points:
        # Open, so that of two equal models both are seen.
        axis.scatter(
            [x], [accuracy], s=90, marker=MARKERS[i % 7], facecolor="none", edgecolor=COLOURS[i % 7], linewidth=2
        )
    if high / low >= 4:
        axis.set_xscale("log")
        axis.set_xlim(low / (high / low) ** 0.2, high * (high / low) ** 0.2)
        _plain_log_ticks(axis)
    else:
        axis.set_xlim(0, 1.25 * high)
        axis.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axis.margins(y=0.2)


def _label_points(axis: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each label beside its point, on the first side where it covers no point and no label."""
    places = [axis.transData.transform((x, y)) for x, y, _ in points]
    frame = axis.get_window_extent()
    taken = [(px - 8.0, py - 8.0, px + 8.0, py + 8.0) for px, py in places]
    for (px, py), (x, y, label) in zip(places, points, strict=True):
        text = _short(label, length=36)
        wide, high = 7.4 * len(text), 14.0
        sides = [
            (11, 0, "left", "center", (px + 11, py - high / 2)),
            (-11, 0, "right", "center", (px - 11 - wide, py - high / 2)),
            (0, 10, "center", "bottom", (px - wide / 2, py + 10)),
            (0, -10, "center", "top", (px - wide / 2, py - 10 - high)),
        ]

        def free(side: tuple[int, int, str, str, tuple[float, float]], wide: float = wide, high: float = high) -> bool:
            left, low = side[4]
            inside = frame.x0 <= left and left + wide <= frame.x1 + 8
            return inside and not any(
                left < t[2] and left + wide > t[0] and low < t[3] and low + high > t[1] for t in taken
            )

        dx, dy, ha, va, (left, low) = next(filter(free, sides), sides[2])
        taken.append((left, low, left + wide, low + high))
        axis.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=10.5)


def _plain_log_ticks(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def confusion(row: ModelRow) -> str:
    """Which class is taken for which, in percent of the true class; empty text without counts or over 30 classes."""
    names, counts = row.class_names, row.confusion
    if not counts or len(names) != len(counts) or len(counts) > 30:
        return ""
    shares = [[100 * n / max(1, sum(line)) for n in line] for line in counts]
    many = len(names) > 12

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.pcolormesh(shares, cmap="Greys", vmin=0, vmax=110, edgecolors="white", linewidth=0.5)
        axis.invert_yaxis()
        axis.grid(visible=False)
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                if share >= 0.5:
                    axis.text(
                        x + 0.5,
                        y + 0.5,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7 if many else 10,
                        color="white" if share > 55 else "black",
                    )
        ticks = [i + 0.5 for i in range(len(names))]
        axis.set_xticks(ticks, [_short(n) for n in names], rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(ticks, [_short(n) for n in names])
        axis.set(xlabel="Predicted class", ylabel="True class")

    side = 2.4 + (0.3 if many else 0.5) * len(names)
    return _svg("confusion", f"Confusion matrix of {row.label}", (max(5.0, side + 1), max(4.0, side * 0.82)), draw)


def footprint_bars(names: Sequence[str], panels: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Horizontal bars of the stages, a panel for each (title with unit, values); one without values is left out."""
    shown = [(title, values) for title, values in panels if any(values)]
    if not shown or not names:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        rows = range(len(names))
        for i, (axis, (title, values)) in enumerate(zip(axes, shown, strict=True)):
            known = [value or 0.0 for value in values]
            axis.barh(rows, known, height=0.62, color=COLOURS[i % 7], edgecolor="#333333", linewidth=0.6)
            for y, value in zip(rows, values, strict=True):
                text = "unknown" if value is None else formats.three_digits(value)
                axis.annotate(text, (value or 0.0, y), (4, 0), textcoords="offset points", va="center", fontsize=10)
            axis.set(title=title, xlim=(0, max(known) * 1.4))
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="x", labelbottom=False, length=0)  # The figures stand at the bars.
        axes[0].set_yticks(list(rows), [_short(name) for name in names])
        axes[0].invert_yaxis()

    return _svg("footprint", "Time and footprint by stage", (WIDTH, 1.0 + 0.34 * len(names)), draw)


def _short(text: str, *, length: int = 24) -> str:
    # A dollar sign would begin mathematics in matplotlib.
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
