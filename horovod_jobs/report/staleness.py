"""How old the parameters were that workers of a parameter server computed with: a histogram, and a line of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from horovod_jobs.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from horovod_jobs.report.collect import StageView


@dataclass(frozen=True)
class Staleness:
    """What a stage's servers counted (``strategy.parameter_server.account``). reads: steps of the slowest worker missed -> how many."""

    stage: str
    reads: Mapping[int, int]
    bound: int | None

    @property
    def total(self) -> int:
        return sum(self.reads.values())

    @property
    def text(self) -> str:
        """The histogram in words."""
        shares = ", ".join(f"{100 * count / self.total:.3g} % missed {steps}" for steps, count in self.reads.items())
        bound = "no bound" if self.bound is None else f"bound {self.bound}"
        return f"staleness in {self.stage}: of {self.total:,} reads {shares} steps of the slowest worker ({bound})"


def of_stage(name: str, meta: Mapping[str, Any]) -> Staleness | None:
    """From an artifact's record; None where no parameter server counted."""
    exchange = (meta.get("details") or {}).get("exchange") or {}
    counted = {int(steps): int(count) for steps, count in (exchange.get("read_staleness_steps") or {}).items()}
    if not sum(counted.values()):
        return None
    # Only ssp has one; async has none, and in sync every read is of the newest.
    bound = {"sync": 0, "ssp": exchange.get("staleness_bound")}.get(str(exchange.get("consistency")))
    return Staleness(name, dict(sorted(counted.items())), bound)


def of_stages(stages: Sequence[StageView]) -> list[Staleness]:
    """The stages that a parameter server trained."""
    found = (of_stage(str(stage.entry["name"]), stage.meta) for stage in stages)
    return [record for record in found if record is not None]


def histogram(records: Sequence[Staleness]) -> str:
    """Share of the reads by staleness, a panel a stage; empty text without records."""
    if not records:
        return ""

    def draw(figure: Figure) -> None:
        for axes, record in zip(figure.subplots(len(records), 1, squeeze=False)[:, 0], records, strict=True):
            steps = list(record.reads)
            axes.bar(
                steps,
                [100 * count / record.total for count in record.reads.values()],
                color=plots.COLOURS[0],
                width=0.6,
            )
            if record.bound is not None:
                axes.axvline(
                    record.bound + 0.5, color=plots.COLOURS[-1], linestyle="--", label=f"bound of {record.bound}"
                )
                axes.legend(loc="best")
            axes.set_xticks(
                range(max(*steps, record.bound or 0) + 1) if max(steps) <= 20 else steps[:: len(steps) // 10 or 1]
            )
            axes.set(
                title=f"{record.stage}: share of {record.total:,} reads, %",
                xlabel="Steps of the slowest worker that a read missed",
            )

    names = ", ".join(record.stage for record in records)
    return plots._svg("staleness", f"Staleness of reads in {names}", (plots.WIDTH, 0.6 + 2.6 * len(records)), draw)
