"""Every strategy against all-reduce on the same work: whole jobs from the command line, one after the other, in rounds.

Each job trains the same MLP on Fashion-MNIST with the same global batch on two working ranks of this host and is measured by what
its own record says: samples a second, step and exchange time, validation accuracy, bytes. A parameter server of its own is a
third process, which must share this host's cores with the workers. ``--only stages`` instead makes an ensemble's members one after
the other and side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, note, paired, parser, spread, table
from horovod_jobs.errors import SetupError

WORK = ("graph=train", "data=fashion_mnist", "model=mlp", "footprint=none", "tracker=none", "run.progress=none",
        "stages.eval_model.enabled=false", "stages.report.enabled=false", "launch=local", "launch.threads=1")  # fmt: skip
# title -> ranks, what differs on the command line
STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "all-reduce": (2, ()),
    "parameter server, one of its own, sync": (3, ("strategy=parameter_server",)),
    "parameter server, one of its own, async": (3, ("strategy=parameter_server", "strategy.consistency=async")),
    "parameter server, colocated, sync": (2, ("strategy=parameter_server", "strategy.servers=colocated")),
    "parameter server, colocated, ssp of 2": (
        2,
        ("strategy=parameter_server", "strategy.servers=colocated", "strategy.consistency=ssp"),
    ),
    "parameter server, colocated, async": (
        2,
        ("strategy=parameter_server", "strategy.servers=colocated", "strategy.consistency=async"),
    ),
    "parameter server, colocated, weights averaged": (
        2,
        ("strategy=parameter_server", "strategy.servers=colocated", "strategy.averaging=weights"),
    ),
    "local SGD, period 8": (2, ("strategy=local_sgd",)),
    "post-local SGD, period 8 from the middle": (2, ("strategy=local_sgd", "strategy.start_fraction=0.5")),
    "Adasum": (2, ("strategy.op=adasum",)),
    "predivide by 2": (2, ("strategy.predivide=2",)),
    "two-level sums": (2, ("strategy.hierarchical=true",)),
    "shares by throughput": (2, ("strategy.balance=throughput",)),
    "elastic": (2, ("strategy=elastic",)),
    "compression: fp16": (2, ("strategy.compression=fp16",)),
    "compression: bf16": (2, ("strategy.compression=bf16",)),
    "compression: top-k 1 %, no warm-up": (2, ("strategy=topk", "strategy.compression.warmup_epochs=0")),
    "compression: random-k 10 %": (2, ("strategy.compression=randomk",)),
    "compression: one bit": (2, ("strategy.compression=onebit",)),
    "compression: QSGD, 4 bits": (2, ("strategy.compression=qsgd",)),
    "compression: PowerSGD, rank 2": (2, ("strategy.compression=powersgd",)),
}
REFERENCE, WORKERS = "all-reduce", 2
PARTS = ("strategies", "stages")
# Three members and two ranks: side by side two train at once, then the third on both.
SIDE_BY_SIDE = {"one after the other": 1, "two side by side": 2}


def job(title: str, overrides: Sequence[str], *, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a job in places of its own: its manifest, and what the first trained model's record says of the exchange.

    Raises:
        SetupError: the job failed; its own message is above.
    """
    with tempfile.TemporaryDirectory(dir=directory) as made:
        places = [f"run.root={made}/runs", f"run.store={made}/artifacts"]
        command = [sys.executable, "-m", "horovod_jobs", *overrides, *places]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
        if done.returncode:
            raise SetupError(f"the job of {title!r} ended with exit code {done.returncode}; see its message above")
        told = json.loads((Path(made) / "runs" / "latest" / "manifest.json").read_text())
        record = json.loads(next(Path(made).glob("artifacts/*/artifact.json")).read_text())
    return told, record["meta"]["details"].get("exchange") or {}


def run(title: str, *, directory: Path, epochs: int, max_steps: int | None) -> dict[str, float | None]:
    """One job's figures, from its manifest and its model's record."""
    ranks, overrides = STRATEGIES[title]
    steps = [] if max_steps is None else [f"fit.max_steps={max_steps}"]
    told, exchange = job(
        title, [*WORK, *overrides, f"launch.np={ranks}", f"fit.epochs={epochs}", *steps], directory=directory
    )
    metrics = told["stages"][0]["metrics"]
    names = ("samples_per_s", "step_ms", "exchange_ms", "validation_accuracy")
    found: dict[str, float | None] = {
        name: None if metrics.get(name) is None else float(metrics[name]) for name in names
    }
    # Servers count what all workers pushed.
    pushed = exchange["bytes_pushed"] / WORKERS if "bytes_pushed" in exchange else None
    return {**found, "bytes_sent": exchange.get("bytes_sent", pushed)}


def measure_strategies(args: argparse.Namespace, *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Every strategy that was asked for, and all-reduce, in rounds."""
    rounds, epochs, max_steps = (1, 1, 20) if args.quick else (args.rounds, 2, None)
    titles = [title for title in STRATEGIES if not args.strategy or title in (REFERENCE, *args.strategy)]
    found: dict[str, list[dict[str, float | None]]] = {title: [] for title in titles}
    for number in range(rounds):
        for title in titles[:: 1 if number % 2 == 0 else -1]:
            note(f"round {number + 1} of {rounds}: {title}")
            found[title].append(run(title, directory=directory, epochs=epochs, max_steps=max_steps))
    figures: dict[str, Any] = {}
    rows = []
    for title, runs in found.items():
        ratio = paired(_all(runs, "step_ms"), _all(found[REFERENCE], "step_ms"))
        figures[title] = {"runs": runs, "step_to_allreduce": ratio}
        sent = _all(runs, "bytes_sent")
        accuracies = [100 * value for value in _all(runs, "validation_accuracy")]
        rows.append([title, spread(_all(runs, "step_ms"), digits=2), str(ratio), _shown(_all(runs, "exchange_ms")),
                     f"{statistics.median(_all(runs, 'samples_per_s')):.0f}", f"{sent[0] / 1e6:.1f}" if sent else "-",
                     spread(accuracies, digits=2)])  # fmt: skip
    head = [
        "strategy",
        "step, ms",
        "/ all-reduce",
        "of it exchange, ms",
        "samples/s",
        "MB sent by a worker",
        "validation accuracy, %",
    ]
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {rounds} rounds of jobs, one after the other: "
        f"MLP 784-256-128-10 on Fashion-MNIST, global batch 128, {epochs} epochs, two workers with one thread each. Steps of a "
        "strategy without lock step are those of one worker, which makes its own half of each global batch. MB: what a worker "
        "gave to collectives, or pushed to servers, in the whole stage."
    )
    return text, figures


def measure_stages(args: argparse.Namespace, *, directory: Path) -> tuple[str, dict[str, Any]]:
    """An ensemble's members one after the other and side by side, in rounds: seconds of the whole job."""
    rounds = 1 if args.quick else args.rounds
    work = ["graph=ensemble", "data=fashion_mnist", "model=mlp", "footprint=none", "tracker=none", "run.progress=none",
            *[f"stages.eval_{one}.enabled=false" for one in "abc"], "stages.report.enabled=false",
            "launch=local", "launch.threads=1", "launch.np=2",
            "fit.epochs=1" if args.quick else "fit.epochs=2", *(["fit.max_steps=20"] if args.quick else [])]  # fmt: skip
    seconds: dict[str, list[float]] = {title: [] for title in SIDE_BY_SIDE}
    for number in range(rounds):
        for title in list(SIDE_BY_SIDE)[:: 1 if number % 2 == 0 else -1]:
            note(f"round {number + 1} of {rounds}: members {title}")
            told, _ = job(title, [*work, f"run.parallel_stages={SIDE_BY_SIDE[title]}"], directory=directory)
            seconds[title].append(float(told["totals"]["seconds"]))
    plain = next(iter(seconds.values()))
    rows = [[title, spread(values), str(paired(values, plain))] for title, values in seconds.items()]
    text = (
        f"{table(['three members, two ranks', 'job, s', '/ one after the other'], rows)}\n\nMedian (smallest..largest) of {rounds} "
        "rounds: MLP 784-256-128-10 on Fashion-MNIST, global batch 128, training only."
    )
    return text, seconds


def _all(runs: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for one in runs if (value := one[name]) is not None]


def _shown(values: Sequence[float]) -> str:
    return spread(values, digits=2) if values else "-"


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--rounds", type=int, default=3)
    args_parser.add_argument("--only", choices=PARTS, help="one part; both without it")
    args_parser.add_argument(
        "--strategy", action="append", choices=list(STRATEGIES), help="these beside all-reduce; all without it"
    )
    args = args_parser.parse_args()
    parts = {"strategies": measure_strategies, "stages": measure_stages}
    chosen = [args.only] if args.only else list(PARTS)
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        found = {part: parts[part](args, directory=Path(directory)) for part in chosen}
    text = "\n\n".join(one for one, _ in found.values())
    figures = {part: one for part, (_, one) in found.items()}
    conclude("Strategies on one host", text, figures=figures, args=args)


if __name__ == "__main__":
    main()
