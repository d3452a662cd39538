"""Every strategy against all-reduce on the same work: whole jobs from the command line, one after the other, in rounds.

Each job trains the same MLP on Fashion-MNIST with the same global batch on two working ranks of this host and is measured by what
its own record says: samples a second, step and exchange time, validation accuracy, bytes. A parameter server of its own is a
third process, which must share this host's cores with the workers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
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
    "Adasum": (2, ("strategy.op=adasum",)),
    "two-level sums": (2, ("strategy.hierarchical=true",)),
    "shares by throughput": (2, ("strategy.balance=throughput",)),
}


def run(title: str, *, directory: Path, epochs: int, max_steps: int | None) -> dict[str, float]:
    """One job's figures, from its manifest.

    Raises:
        SetupError: the job failed; its own message is above.
    """
    ranks, overrides = STRATEGIES[title]
    steps = [] if max_steps is None else [f"fit.max_steps={max_steps}"]
    with tempfile.TemporaryDirectory(dir=directory) as made:
        places = [f"run.root={made}/runs", f"run.store={made}/artifacts"]
        command = [
            sys.executable,
            "-m",
            "horovod_jobs",
            *WORK,
            *overrides,
            f"launch.np={ranks}",
            f"fit.epochs={epochs}",
        ]
        done = subprocess.run([*command, *steps, *places], stdout=subprocess.DEVNULL, env=dict(os.environ))
        if done.returncode:
            raise SetupError(f"the job of {title!r} ended with exit code {done.returncode}; see its message above")
        stage = json.loads((Path(made) / "runs" / "latest" / "manifest.json").read_text())["stages"][0]
    names = ("samples_per_s", "step_ms", "exchange_ms", "validation_accuracy")
    return {name: float(stage["metrics"][name]) for name in names}


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--rounds", type=int, default=3)
    args = args_parser.parse_args()
    rounds, epochs, max_steps = (1, 1, 20) if args.quick else (args.rounds, 2, None)
    found: dict[str, list[dict[str, float]]] = {title: [] for title in STRATEGIES}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        for number in range(rounds):
            for title in list(STRATEGIES)[:: 1 if number % 2 == 0 else -1]:
                note(f"round {number + 1} of {rounds}: {title}")
                found[title].append(run(title, directory=Path(directory), epochs=epochs, max_steps=max_steps))
    figures: dict[str, Any] = {}
    rows = []
    reference = [one["step_ms"] for one in found["all-reduce"]]
    for title, runs in found.items():
        times = [one["step_ms"] for one in runs]
        ratio = paired(times, reference)
        figures[title] = {"runs": runs, "step_to_allreduce": ratio}
        rows.append(
            [
                title,
                spread(times, digits=2),
                str(ratio),
                spread([one["exchange_ms"] for one in runs], digits=2),
                f"{statistics.median(one['samples_per_s'] for one in runs):.0f}",
                spread([100 * one["validation_accuracy"] for one in runs], digits=2),
            ]
        )
    head = ["strategy", "step, ms", "/ all-reduce", "of it exchange, ms", "samples/s", "validation accuracy, %"]
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {rounds} rounds of jobs, one after the other: "
        f"MLP 784-256-128-10 on Fashion-MNIST, global batch 128, {epochs} epochs, two workers with one thread each. Steps of a "
        "strategy without lock step are those of one worker, which makes its own half of each global batch."
    )
    conclude("Strategies on one host", text, figures=figures, args=args)


if __name__ == "__main__":
    main()
