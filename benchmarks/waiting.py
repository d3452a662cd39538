"""What waiting costs: a small blocking all-reduce, one whose other rank is late, and the processor time of ranks that wait or idle.

Two ranks of this host by MPI and by Gloo. ``--against PYTHON`` names another environment's Python, with another build of Horovod:
then both are measured in every round, next to each other, and the ratio is printed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import conclude, note, paired, parser, spread, table

CONTROLLERS = {"MPI": [], "Gloo": ["--gloo"]}
FIGURES = {
    "small": "all-reduce of 256 bytes, ms",
    "late": "the same for a rank that comes 3 ms after the other, ms",
    "waiting": "cores that a rank uses while it waits",
    "idle": "cores that a rank uses while it waits for nothing",
}
_PAUSE_S = 3.0


def rank_main() -> None:
    """One rank; the last one prints the figures as JSON."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)
    tensor, last = torch.ones(64), hvd.rank() == hvd.size() - 1

    def allreduce() -> None:
        hvd.allreduce(tensor, name="bench.small", op=hvd.Sum)

    def late() -> None:
        allreduce()
        until = time.perf_counter() + (0.003 if last else 0.0)
        while time.perf_counter() < until:
            pass

    def pause() -> None:
        if not last:
            time.sleep(_PAUSE_S)

    found = {"small": 1000 * _median_s(lambda: None, allreduce, calls=200)}
    found["late"] = 1000 * _median_s(late, allreduce, calls=60)
    allreduce()
    found["waiting"] = _cores(lambda: (pause(), allreduce()))
    allreduce()
    found["idle"] = _cores(lambda: time.sleep(_PAUSE_S))
    if last:
        print("FOUND" + json.dumps(found), flush=True)
    allreduce()
    hvd.shutdown()


def _median_s(before: Callable[[], object], call: Callable[[], object], *, calls: int) -> float:
    taken = []
    for _ in range(calls):
        before()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _cores(body: Callable[[], object]) -> float:
    used, start = time.process_time(), time.perf_counter()
    body()
    return (time.process_time() - used) / (time.perf_counter() - start)


def measure(python: str, options: list[str]) -> dict[str, float]:
    """The figures of two ranks in an environment, started by its ``horovodrun``.

    Raises:
        subprocess.CalledProcessError: the ranks failed; their messages are above.
    """
    here = Path(python).parent
    env = {
        **os.environ,
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [str(here / "horovodrun"), *options, "-np", "2", python, "-m", "benchmarks.waiting", "--rank"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.split("FOUND")[1].splitlines()[0])
    return found


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--against", metavar="PYTHON", help="the Python of another environment")
    args = args_parser.parse_args()
    rounds = 1 if args.quick else 5
    pythons = [sys.executable, *([args.against] if args.against else [])]
    rows, figures = [], {}
    for controller, options in CONTROLLERS.items():
        note(f"{controller}: {rounds} rounds")
        found = [[measure(python, options) for python in pythons] for _ in range(rounds)]
        for key, title in FIGURES.items():
            columns = [[both[index][key] for both in found] for index in range(len(pythons))]
            ratio = [str(paired(*columns))] if args.against else []
            rows.append([f"{controller}: {title}", *[spread(column, digits=3) for column in columns], *ratio])
            figures[f"{controller} {key}"] = columns
    head = ["two ranks of one host", "here", *(["there", "here / there"] if args.against else [])]
    text = f"{table(head, rows)}\n\nMedian (smallest..largest) of {rounds} rounds."
    conclude("What waiting costs", text, figures=figures, args=args)


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        rank_main()
    else:
        main()
