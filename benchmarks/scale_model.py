"""A cost model of data-parallel steps: fitted on some runs over shaped links, checked on others, and carried to 512 workers.

Fitted by least squares on all-reduces alone and on training steps of two small networks (``FIT``); checked on host counts, rates and a
network that it has not seen (``HELD``); then given the inputs that were published with Horovod's own scaling figures
(``benchmarks/_published.py``). What it holds and leaves out is in docs/network.md.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scipy.optimize import brentq  # type: ignore[import-untyped]

from benchmarks import _published as published
from benchmarks._network_runs import KIB, MIB, size_text
from benchmarks._scaling import (
    Costs,
    Exchange,
    Step,
    Work,
    error_of,
    fit_exchange,
    fit_steps,
    predicted,
    profile,
    step_s,
)
from benchmarks._steps import WORKS
from benchmarks.common import conclude, note, parser, table
from benchmarks.hosts import Hosts, hosts, why_not
from benchmarks.network import METHODS, TUNED, measure_allreduce, mpi, on_hosts
from horovod_jobs.launch.base import usable_cores

METHOD = TUNED
GOAL = 0.15
FIT = ((2, 1000.0), (2, 100.0), (4, 1000.0))  # hosts, Mbit/s
HELD = ((4, 100.0), (3, 300.0), (6, 200.0))
HELD_WORK = "deep MLP"  # Never fitted, wherever it ran.
SIZES = (64 * KIB, MIB, 4 * MIB, 16 * MIB)

Run = Exchange | Step


def measure(made: Hosts, cases: Sequence[tuple[int, float]], *, quick: bool) -> list[Run]:
    """All-reduces and training steps of every case."""
    found: list[Run] = []
    for count, rate in cases:
        crowd = max(1.0, count / usable_cores())
        made.set_rate(rate)
        note(f"{count} hosts, {rate:g} Mbit/s: all-reduce")
        runs = measure_allreduce(
            made, METHOD, count=count, rate_mbit=rate, sizes=SIZES, blocks=2 if quick else 5, compression=("none",)
        )
        found += [Exchange(run.hosts, rate, run.bytes, run.median_s, crowd) for run in runs]
        note(f"{count} hosts, {rate:g} Mbit/s: training steps")
        spec = {"works": list(WORKS), "steps": 3 if quick else 15}
        for row in on_hosts(made, "steps", spec, launcher=mpi(made, count, *METHODS[METHOD])):
            work = Work(tuple((int(size), float(moment)) for size, moment in row["ready"]), row["backward_end_s"],
                        row["total_s"] - row["backward_end_s"])  # fmt: skip
            found.append(Step(row["work"], count, rate, work, statistics.median(row["seconds"]), crowd))
    return found


def fitted_on(run: Run) -> bool:
    """Whether the model may see this run."""
    return (run.hosts, run.rate_mbit) in FIT and not (isinstance(run, Step) and run.name == HELD_WORK)


def fit(runs: Sequence[Run]) -> Costs:
    """All costs from the runs that may be seen."""
    seen = [run for run in runs if fitted_on(run)]
    costs = fit_exchange([run for run in seen if isinstance(run, Exchange)])
    return fit_steps(costs, [run for run in seen if isinstance(run, Step)])


# --- 512 workers --------------------------------------------------------------------------------------------------------
def carried_over(costs: Costs) -> dict[str, Costs]:
    """What of the fitted costs is taken to other hosts, in three ways; their compute and exchange do not share cores.

    ``all``; ``no hops``: without the ring's latency, which grows with the workers and here is that of busy cores; ``link``: without
    copies and sums either, which GPUs make faster, so that the link and the cost of a call are left.
    """
    there = replace(costs, compute_slowed=0.0, exchange_slowed=0.0)
    no_hops = replace(there, hop_s=0.0)
    return {"all": there, "no hops": no_hops, "link": replace(no_hops, byte_s=0.0)}


def efficiency(
    costs: Costs, network: published.Published, *, workers: int, rate_mbit: float = published.RATE_MBIT
) -> float:
    """Images a second of ``workers`` over ``workers`` times those of one."""
    work = profile(network.layers, compute_s=network.compute_s)
    seconds = step_s(costs, work, hosts=workers, rate_mbit=rate_mbit,
                     fusion_bytes=published.FUSION_BYTES, cycle_s=published.CYCLE_S)  # fmt: skip
    return work.total_s / seconds


def rate_that_explains(costs: Costs, network: published.Published) -> float | None:
    """Mbit/s of the link at which the model gives the published efficiency; None where no link from 0.1 to 100 Gbit/s does."""

    def gap(rate_mbit: float) -> float:
        return efficiency(costs, network, workers=published.WORKERS, rate_mbit=rate_mbit) - network.efficiency

    low, high = 100.0, 100_000.0
    return float(brentq(gap, low, high, xtol=1.0)) if gap(low) < 0 < gap(high) else None


# --- showing ------------------------------------------------------------------------------------------------------------
def _name(run: Run) -> str:
    return f"all-reduce, {size_text(run.bytes)}" if isinstance(run, Exchange) else f"step, {run.name}"


def runs_table(costs: Costs, runs: Sequence[Run]) -> str:
    """Every run with what the model says of it."""
    rows = [
        [str(run.hosts), f"{run.rate_mbit:g}", _name(run), f"{1000 * run.seconds:.1f}", f"{1000 * predicted(costs, run):.1f}",
         f"{100 * error_of(costs, run):+.1f} %"]
        for run in runs
    ]  # fmt: skip
    return table(["hosts", "Mbit/s", "run", "measured, ms", "model, ms", "error"], rows)


def costs_table(costs: Costs) -> str:
    """What was fitted, in units one can read."""
    rows = [
        ["an exchange", f"{1000 * costs.call_s:.3f} ms"],
        ["a hop of the ring", f"{1e6 * costs.hop_s:.0f} us"],
        ["a tensor", f"{1e6 * costs.tensor_s:.0f} us"],
        ["a byte on the link", f"{costs.wire:.3f} of its time at the nominal rate"],
        ["a byte elsewhere", f"{1e9 * costs.byte_s:.3f} ns"],
        ["compute slowed by an exchange", f"{100 * costs.compute_slowed:.0f} %"],
        ["an exchange slowed by compute", f"{100 * costs.exchange_slowed:.0f} %"],
    ]
    return table(["cost", "fitted"], rows)


def extrapolated(costs: Costs) -> list[dict[str, Any]]:
    """Each published network: the model's efficiency for each way to carry the costs over, and the published one."""
    ways = carried_over(costs)
    return [
        {
            "network": network.name,
            "parameters": network.parameters,
            "images_per_s": network.images_per_s,
            "model": {way: efficiency(kept, network, workers=published.WORKERS) for way, kept in ways.items()},
            "published": network.efficiency,
            "rate_that_explains_mbit": rate_that_explains(ways["link"], network),
        }
        for network in published.PUBLISHED
    ]


def extrapolated_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown, with the difference from what was published in percentage points."""
    ways = list(rows[0]["model"])
    head = ["network", "parameters", "images/s of one GPU", "published", *[f"model, {way} (difference)" for way in ways],
            "link that explains it"]  # fmt: skip
    shown = []
    for row in rows:
        rate, stated = row["rate_that_explains_mbit"], row["published"]
        cells = [f"{100 * value:.0f} % ({100 * (value - stated):+.0f})" for value in row["model"].values()]
        explained = "none" if rate is None else f"{rate / 1000:.1f} Gbit/s"
        shown.append(
            [
                row["network"],
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['images_per_s']:.0f}",
                f"{100 * stated:.0f} %",
                *cells,
                explained,
            ]
        )
    return table(head, shown)


def _to_json(run: Run) -> dict[str, Any]:
    return {"kind": type(run).__name__, **asdict(run)}


def _from_json(row: dict[str, Any]) -> Run:
    values = {name: value for name, value in row.items() if name != "kind"}
    if row["kind"] == "Exchange":
        return Exchange(**values)
    work = values.pop("work")
    ready = tuple((int(size), float(moment)) for size, moment in work["ready"])
    return Step(**values, work=Work(ready, work["backward_end_s"], work["update_s"]))


def main() -> None:
    """Measure, fit, check, extrapolate and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--runs", type=Path, help="fit the runs of an earlier --json file instead of measuring")
    args = args_parser.parse_args()
    if args.runs is not None:
        runs = [_from_json(row) for row in json.loads(args.runs.read_text())["figures"]["runs"]]
    elif (reason := why_not()) is not None:
        raise SystemExit(f"benchmarks.scale_model cannot measure here: {reason}; --runs PATH fits earlier runs")
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # So that the hosts are ended in order.
        cases = (*FIT, *HELD)
        with hosts(max(count for count, _ in cases)) as made:
            runs = measure(made, cases, quick=args.quick)
    costs = fit(runs)
    seen, unseen = [run for run in runs if fitted_on(run)], [run for run in runs if not fitted_on(run)]
    errors = [abs(error_of(costs, run)) for run in unseen]
    within = sum(error <= GOAL for error in errors)
    far = extrapolated(costs)
    text = [
        f"### Fitted costs\n\n{costs_table(costs)}",
        f"### Runs it was fitted on\n\n{runs_table(costs, seen)}",
        f"### Runs it was not fitted on\n\n{runs_table(costs, unseen)}",
        f"{within} of {len(errors)} predictions are within {100 * GOAL:.0f} %; median error {100 * statistics.median(errors):.1f} %, "
        f"largest {100 * max(errors):.1f} %.",
        f"### {published.WORKERS} workers\n\n{extrapolated_table(far)}",
    ]
    figures = {
        "runs": [_to_json(run) for run in runs],
        "costs": asdict(costs),
        "held_out_errors": errors,
        "extrapolated": far,
    }
    conclude("A model of scaling", "\n\n".join(text), figures=figures, args=args)


if __name__ == "__main__":
    main()
