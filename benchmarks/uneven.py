"""One rank slowed by a CPU limit: epochs with even shares against epochs whose shares follow the ranks' speeds, in one run.

A ``train`` stage as a job runs it, on two ranks. Its strategy hands out even shares in one epoch and what ``balance=throughput`` has
learnt in the next, in turn, so both are measured next to each other in time, with the same model, ranks and slow neighbour. Ranks
get a part of a core: by a cgroup's quota where one can be made (``--slow cgroup``), or else stopped and continued by a
process beside it (``--slow signals``). The result says which.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, die_with_parent, note, paired, parser, run_in_world, spread, table
from horovod_jobs.strategy.balance import Balancer, Shares
from horovod_jobs.strategy.base import StepTime

RANKS = 2
GLOBAL_BATCH = 128
_PERIOD_S = 0.01
_WEIGHT = 16  # A rank is meant to get what its quota grants, whoever else wants the core.
_CNN = {"_target_": "horovod_jobs.models.cnn.StridedCnn", "widths": [32, 48, 96, 160], "strides": [2, 2, 1, 2]}
# title -> synchronised batch norm
CASES = {"batch norm of each rank": False, "synchronised batch norm": True}


class Turns(Balancer):
    """A balancer that is heard in every second epoch only; in the others shares are even and nothing is learnt."""

    def __init__(self, world: Any, *, every: int, epoch: int) -> None:
        super().__init__(world, every=every)
        self._epoch, self._done, self._since = epoch, 0, 0.0
        self.seconds: list[float] = []
        self.own: list[float] = []  # of each epoch, this rank's seconds that were not waiting

    @property
    def heard(self) -> bool:
        return (self._done // self._epoch) % 2 == 1

    @property
    def shares(self) -> Shares | None:
        return super().shares if self.heard else None

    def note(self, spent: StepTime) -> None:
        if self._done % self._epoch == 0:
            self._since, self._own = time.perf_counter() - spent.total_s, 0.0
        self._own += spent.compute_s
        if self.heard:
            super().note(spent)
        self._done += 1
        if self._done % self._epoch == 0:
            self.seconds.append(time.perf_counter() - self._since)
            self.own.append(self._own)

    def reshare(self) -> None:
        # The last look of a balanced epoch comes when its last step is done and the next epoch's turn has begun.
        if self._window:
            super().reshare()


def alternating(*, epoch: int, every: int) -> Any:
    """All-reduce whose updater has ``Turns``, which are its ``turns`` once it is bound."""
    from horovod_jobs.strategy.allreduce import Allreduce

    class Alternating(Allreduce):
        turns: Turns

        def bind(self, *args: Any, **kwargs: Any) -> Any:
            made = super().bind(*args, **kwargs)
            self.turns = Turns(made.world, every=every, epoch=epoch)
            made._balancer, made.reshare_every = self.turns, every
            return made

    return Alternating(tune=False)


def keep(strategy: Any) -> Any:
    """Named as the stage's strategy: the one that is there already."""
    return strategy


# --- a rank that has less of a core ------------------------------------------------------------------------------------


@contextmanager
def quota(part: float) -> Iterator[bool]:
    """Put this process, with all its threads, in a cgroup of its own that gets ``part`` of a core; says whether that went."""
    for above in _own_cgroups():
        home = above / f"uneven-{os.getpid()}"
        try:
            home.mkdir()
        except OSError:
            continue
        try:
            try:
                _set_quota(home, part)
                (home / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                continue
            try:
                yield True
            finally:
                (above / "cgroup.procs").write_text(str(os.getpid()))
            return
        finally:
            home.rmdir()
    yield False


def _own_cgroups() -> Iterator[Path]:
    """Directories of the groups this process is in, those that limit CPU time first; a namespace may hide a part of the path."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in sorted(lines, key=lambda line: "cpu" not in line[1].split(",")):
        mount = Path("/sys/fs/cgroup", *([controllers] if controllers else []))
        for above in (mount / path.lstrip("/"), mount):
            if (above / "cgroup.procs").exists() and (not controllers or "cpu" in controllers.split(",")):
                yield above


def _set_quota(home: Path, part: float) -> None:
    period = round(1e6 * _PERIOD_S)
    if (home / "cpu.cfs_quota_us").exists():
        (home / "cpu.cfs_period_us").write_text(str(period))
        (home / "cpu.cfs_quota_us").write_text(str(round(part * period)))
        (home / "cpu.shares").write_text(str(1024 * _WEIGHT))
    elif (home / "cpu.max").exists():
        (home / "cpu.max").write_text(f"{round(part * period)} {period}")
        (home / "cpu.weight").write_text(str(100 * _WEIGHT))
    else:
        raise OSError("this cgroup does not limit CPU time")


@contextmanager
def stopped_in_turns(part: float) -> Iterator[bool]:
    """Let this process run ``part`` of the time: a process beside it stops and continues it."""
    beside = subprocess.Popen([sys.executable, "-m", "benchmarks.uneven", "--stopper", str(os.getpid()), str(part)])
    try:
        yield True
    finally:
        beside.terminate()
        beside.wait()


def stop_in_turns(pid: int, part: float) -> None:
    """In the process beside: for ever, and never leave the other one stopped."""
    die_with_parent()
    over = False

    def end(*_: Any) -> None:
        nonlocal over
        over = True

    signal.signal(signal.SIGTERM, end)
    try:
        while not over:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_PERIOD_S * (1 - part))
            os.kill(pid, signal.SIGCONT)
            time.sleep(_PERIOD_S * part)
    finally:
        os.kill(pid, signal.SIGCONT)


# --- the ranks -----------------------------------------------------------------------------------------------------------


def rank_main(settings: dict[str, Any], path: Path) -> None:
    """In a rank: every case in turn; rank 0 writes what was measured."""
    import torch

    from horovod_jobs.comm.connect import connect
    from horovod_jobs.data.fashion_mnist import fashion_mnist
    from horovod_jobs.launch import in_rank

    torch.set_num_threads(1)
    in_rank.register_rank()
    world = connect()
    data: Any = fashion_mnist()
    data = replace(data, train=data.train.subset(torch.arange(settings["steps"] * GLOBAL_BATCH)), validation=None)
    found = {}
    slow = quota if settings["slow"] == "cgroup" else stopped_in_turns
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        shared = Path(world.broadcast_json(directory, name="bench.directory"))
        for number, (title, synchronised) in enumerate(CASES.items()):
            if world.is_main:
                note(title)
            part = settings["parts"][world.rank]
            with (slow if part < 1 else unlimited)(part) as done:
                if not all(world.gather_json(done, name="bench.slow")):
                    raise SystemExit("no cgroup with a CPU quota can be made here; use --slow signals")
                found[title] = _measure(shared / str(number), world=world, data=data, synchronised=synchronised,
                                        settings=settings)  # fmt: skip
        world.barrier(name="bench.end")
    if world.is_main:
        path.write_text(json.dumps(found))
    world.shutdown()
    in_rank.record_exit(0)


@contextmanager
def unlimited(part: float) -> Iterator[bool]:
    yield True


def _measure(directory: Path, *, world: Any, data: Any, synchronised: bool, settings: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.loop_overhead import _context
    from horovod_jobs.config import FitConfig, TrainStage
    from horovod_jobs.stages import train

    strategy = alternating(epoch=settings["steps"], every=settings["every"])
    node = {"_target_": "benchmarks.uneven.keep", "strategy": strategy}
    fit = FitConfig(epochs=2 * settings["rounds"], global_batch=GLOBAL_BATCH, sync_batchnorm=synchronised,
                    checkpoint_every_s=None, validate_every_epochs=0)  # fmt: skip
    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9}
    schedule = {"_target_": "horovod_jobs.training.schedules.OneCycle"}
    cfg = TrainStage(seed=0, model=_CNN, optimizer=optimizer, schedule=schedule, strategy=node, fit=fit)
    train.run(_context(directory, world=world, data=data), cfg)
    turns = strategy.turns
    owns = world.gather_json(turns.own, name="bench.own")
    return {"even_s": turns.seconds[0::2], "balanced_s": turns.seconds[1::2], "balance": turns.describe(),
            "own_s_by_rank": owns}  # fmt: skip


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--slow", choices=("cgroup", "signals"), help="how the last rank is slowed; else what can be done here"
    )
    options.add_argument(
        "--parts", type=float, nargs=RANKS, default=[1.0, 0.5], help="of a core for each rank; 1: no limit"
    )
    options.add_argument("--steps", type=int, default=100, help="steps an epoch")
    options.add_argument("--rounds", type=int, default=6, help="pairs of epochs; the first is not counted")
    options.add_argument("--plot", type=Path, help="also write the shares over time to this file (SVG)")
    args = options.parse_args()
    settings: dict[str, Any] = {"steps": args.steps, "rounds": args.rounds, "every": max(5, args.steps // 5)}
    if args.quick:
        settings = {"steps": 20, "rounds": 2, "every": 5}
    with quota(1.0) as possible:
        slow = args.slow or ("cgroup" if possible else "signals")
    settings |= {"slow": slow, "parts": args.parts}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        path = Path(directory) / "found.json"
        run_in_world("benchmarks.uneven", ["--rank", json.dumps(settings), str(path)], ranks=RANKS)
        found = json.loads(path.read_text())
    rows = []
    for title, case in found.items():
        # The first pair of epochs is where the shares arrive: its time is shown, and not counted.
        case["balanced_to_even"] = paired(case["balanced_s"][1:], case["even_s"][1:])
        own = [statistics.median(seconds[2::2]) for seconds in case["own_s_by_rank"]]
        rows.append([title, f"{own[-1] / own[0]:.2f}", spread(case["even_s"][1:], digits=2), f"{case['balanced_s'][0]:.2f}",
                     spread(case["balanced_s"][1:], digits=2), str(case["balanced_to_even"]),
                     " : ".join(f"{100 * share:.0f}" for share in case["balance"]["shares"]) or "even"])  # fmt: skip
    head = ["model", "slow rank takes", "even, s an epoch", "first balanced", "balanced, s an epoch", "balanced / even",
            "shares at the end, %"]  # fmt: skip
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {settings['rounds'] - 1} pairs of epochs of {settings['steps']} steps, the "
        f"first pair left out: in it the shares arrive. Strided CNN, Fashion-MNIST, global batch {GLOBAL_BATCH}, {RANKS} ranks, a thread "
        f"each, which get {' and '.join(f'{part:g}' for part in args.parts)} of a core ({slow}, periods of {1000 * _PERIOD_S:g} ms). "
        "`slow rank takes`: its own time for half of a batch, as a multiple of the other's, in the even epochs."
    )
    if args.plot is not None:
        from horovod_jobs.report.sharing import Sharing, shares_over_time

        records = [Sharing(title, case["balance"]["history"]) for title, case in found.items()]
        args.plot.write_text(shares_over_time(records))
    conclude("Uneven ranks", text, figures=found, args=args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        rank_main(json.loads(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--stopper"]:
        stop_in_turns(int(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
