"""The report's plot of uneven shares: what part of the batch each rank had, and what a step took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from horovod_jobs.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from horovod_jobs.report.collect import StageView

_NAMED = 8  # with more ranks a legend says less than the lines


@dataclass(frozen=True)
class Sharing:
    """What a balanced stage recorded at each look at its ranks' speeds (see ``strategy.balance.Balancer.describe``)."""

    stage: str
    history: list[dict[str, Any]]


def of_stages(stages: Sequence[StageView]) -> list[Sharing]:
    """The stages that had shares to give; those whose ranks were not balanced are left out."""
    found = []
    for stage in stages:
        exchange = (stage.meta.get("details") or {}).get("exchange") or {}
        history = (exchange.get("balance") or {}).get("history") or []
        if history:
            found.append(Sharing(str(stage.entry["name"]), list(history)))
    return found


def shares_over_time(records: Sequence[Sharing]) -> str:
    """Shares and the time of a step, a row a stage; empty text without records."""
    if not records:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(records), 2, squeeze=False)
        for (left, right), record in zip(axes, records, strict=True):
            # A record has the shares that were in force from its step on, and the mean step of the steps before it.
            steps = [entry["step"] for entry in record.history]
            size = len(record.history[0]["shares"])
            for rank in range(size):
                left.plot(
                    [0, *steps],
                    [100 / size, *(100 * entry["shares"][rank] for entry in record.history)],
                    drawstyle="steps-post",
                    color=plots.COLOURS[rank % 7],
                    linestyle=plots.LINES[rank % 7],
                    label=f"rank {rank}",
                )
            left.set(title=f"{record.stage}: share of the batch, %", xlabel="Step")
            left.set_ylim(bottom=0)
            right.plot(
                steps,
                [entry["step_ms"] for entry in record.history],
                color=plots.COLOURS[-1],
                marker="o",
                markevery=max(1, len(steps) // 8),
            )
            right.set(title=f"{record.stage}: time of a step, ms", xlabel="Step")
            right.set_ylim(bottom=0)
            if size <= _NAMED:
                left.legend(loc="best", ncols=2)

    names = ", ".join(record.stage for record in records)
    return plots._svg(
        "shares", f"Shares of the batch by rank in {names}", (plots.WIDTH, 0.6 + 3.1 * len(records)), draw
    )
