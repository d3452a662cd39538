"""A training step under this project's launcher and exchange against torchrun with DDP on gloo, on two ranks of this host.

Four worlds of two ranks, one thread a rank, are alive at the same time: ours (tuned by the probe in its first steps), DDP
(25 MB buckets, gradients as views of them), two ranks that only wait for each other in every step, and two that exchange nothing
at all, which is the bound. They take turns in short blocks; the processes of those that wait are stopped (SIGSTOP), so that each
block has the machine to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, die_with_parent, note, paired, parser, spread, table, write_whole
from horovod_jobs.errors import SetupError

RANKS = 2
SYSTEMS = ("ours", "ddp", "meet", "bound")
_START_LIMIT_S = 600.0


# --- in a rank --------------------------------------------------------------------------------------------------------
def rank_main(system: str, work: str, directory: Path, *, warmup: int) -> None:
    """One rank of one world: warm up, then a block of steps whenever the parent asks for one."""
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    rank, step, describe, close = _SETUPS[system](work)
    for _ in range(max(warmup, 1)):
        step()
    while not describe()["ready"]:
        step()
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    block = 0
    while True:
        write_whole(directory / f"idle-{block}-{rank}", json.dumps(describe()))
        order = directory / f"go-{block}"
        while not order.exists():
            time.sleep(0.005)
        steps = int(order.read_text())
        if steps == 0:
            break
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        write_whole(directory / f"times-{block}-{rank}", json.dumps(seconds))
        block += 1
    close()


Setup = tuple[int, Callable[[], None], Callable[[], dict[str, Any]], Callable[[], None]]


def _parts(work: str, rank: int) -> tuple[Any, Any, Any]:
    import torch

    from benchmarks._workloads import WORKLOADS

    torch.manual_seed(0)
    chosen = WORKLOADS[work]
    model = chosen.model()
    batch = chosen.batch(torch.Generator().manual_seed(rank))
    return model, chosen.optimizer(list(model.parameters())), batch


def _meet(work: str) -> Setup:
    """Ranks that wait for each other once a step: whatever is exchanged, no step with an exchange is shorter."""
    import torch

    from benchmarks._workloads import loss_of
    from horovod_jobs.comm.connect import connect
    from horovod_jobs.launch import in_rank

    in_rank.register_rank()
    world = connect()
    model, optimizer, batch = _parts(work, world.rank)
    one = torch.ones(1)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        world.allreduce(one, name="bench.meet")
        optimizer.step()

    def close() -> None:
        world.barrier(name="bench.end")
        world.shutdown()
        in_rank.record_exit(0)

    return world.rank, step, lambda: {"ready": True}, close


def _ours(work: str) -> Setup:
    from benchmarks._workloads import loss_of
    from horovod_jobs.comm.connect import connect
    from horovod_jobs.launch import in_rank
    from horovod_jobs.strategy.allreduce import Allreduce
    from horovod_jobs.strategy.base import Setting, StepTime

    in_rank.register_rank()
    world = connect()
    model, optimizer, batch = _parts(work, world.rank)
    # As in a long stage, so that the probe of the first steps runs.
    updater = Allreduce().bind(optimizer, model.named_parameters(), Setting(world, total_steps=1_000_000))

    def step() -> None:
        start = time.perf_counter()
        updater.zero_grad()
        (loss_of(model, batch) / world.size).backward()
        updater.synchronize()
        updater.step()
        seconds = time.perf_counter() - start
        updater.finish_step(StepTime(total_s=seconds, compute_s=seconds, samples=len(batch[1])))

    def describe() -> dict[str, Any]:
        return {"ready": not updater.tuning, **updater.describe()}

    def close() -> None:
        updater.close()
        world.barrier(name="bench.end")
        world.shutdown()
        in_rank.record_exit(0)

    return world.rank, step, describe, close


def _ddp(work: str) -> Setup:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks._workloads import loss_of

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer, batch = _parts(work, rank)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()

    return rank, step, lambda: {"ready": True}, dist.destroy_process_group


def _bound(work: str) -> Setup:
    from benchmarks._workloads import loss_of

    rank = int(os.environ["BENCH_RANK"])
    model, optimizer, batch = _parts(work, rank)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    return rank, step, lambda: {"ready": True}, lambda: None


_SETUPS: dict[str, Callable[[str], Setup]] = {"ours": _ours, "ddp": _ddp, "meet": _meet, "bound": _bound}


# --- in the parent ----------------------------------------------------------------------------------------------------
class PausedWorld:
    """A world that runs a block of steps when it is asked to, and is stopped in between."""

    def __init__(self, system: str, work: str, directory: Path, *, warmup: int) -> None:
        self.system, self.directory = system, directory
        self._blocks = 0
        self._pids: list[int] = []
        arguments = ["--rank", system, work, str(directory), str(warmup)]
        self._processes = [
            subprocess.Popen(argv, env=env, start_new_session=True, preexec_fn=die_with_parent)
            for argv, env in _commands(system, arguments)
        ]

    def settle(self) -> None:
        """Wait until it is warm and tuned, and stop it."""
        self.described = self._wait("idle", limit_s=_START_LIMIT_S)[0]
        self._pids = [int((self.directory / f"pid-{rank}").read_text()) for rank in range(RANKS)]
        self._signal(signal.SIGSTOP)

    def block(self, steps: int) -> float:
        """Median seconds of a step, the slower rank's."""
        self._order(steps)
        seconds = self._wait("times", limit_s=60 + 5.0 * steps)
        self._blocks += 1
        self._wait("idle", limit_s=60)
        self._signal(signal.SIGSTOP)
        return max(statistics.median(times) for times in seconds)

    def _order(self, steps: int) -> None:
        self._signal(signal.SIGCONT)
        write_whole(self.directory / f"go-{self._blocks}", str(steps))

    def _wait(self, kind: str, *, limit_s: float) -> list[Any]:
        paths = [self.directory / f"{kind}-{self._blocks}-{rank}" for rank in range(RANKS)]
        deadline = time.monotonic() + limit_s
        while not all(path.exists() for path in paths):
            failed = [process.returncode for process in self._processes if process.poll() is not None]
            if failed or time.monotonic() > deadline:
                why = f"ended with exit code {failed[0]}" if failed else f"did not answer in {limit_s:.0f} s"
                raise SetupError(f"the world of {self.system} {why}; see its messages above")
            time.sleep(0.01)
        return [json.loads(path.read_text()) for path in paths]

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            os.kill(pid, number)

    def close(self) -> None:
        """End the world in order; what does not end is killed, and its ranks with it."""
        if self._pids and all(process.poll() is None for process in self._processes):
            self._order(0)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30 if self._pids else 0)
            process.kill()
            process.wait()


def _commands(system: str, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, with its environment: one launcher, or the two ranks of the bound."""
    from horovod_jobs.config import LaunchConfig
    from horovod_jobs.launch.base import this_host
    from horovod_jobs.launch.local import plan
    from horovod_jobs.strategy.allreduce import Allreduce

    module = ["-m", "benchmarks.peer_ddp", *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if system in ("ours", "meet"):
        config = LaunchConfig(kind="local", np=RANKS, threads=1)
        planned = plan(config, host=this_host(), environ=environ, command=[sys.executable, *module])
        return [(planned.argv, {**planned.env, **Allreduce().environment()})]
    if system == "ddp":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        return [([sys.executable, *torchrun, *module], environ)]
    return [([sys.executable, *module], {**environ, "BENCH_RANK": str(rank)}) for rank in range(RANKS)]


@contextmanager
def paused_world(system: str, work: str, *, warmup: int) -> Iterator[PausedWorld]:
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        world = PausedWorld(system, work, Path(directory), warmup=warmup)
        try:
            world.settle()
            yield world
        finally:
            world.close()


def measure(work: str, *, rounds: int, steps: int, warmup: int) -> dict[str, Any]:
    """Milliseconds a step by system, one a round; and what our probe chose."""
    found: dict[str, Any] = {system: [] for system in SYSTEMS}
    with ExitStack() as stack:
        worlds = []
        for system in SYSTEMS:
            note(f"{work}: starting {system}")
            worlds.append(stack.enter_context(paused_world(system, work, warmup=warmup)))
        note(f"{work}: {rounds} rounds")
        for number in range(rounds):
            turn = worlds if number % 2 == 0 else worlds[::-1]  # Nobody is always the first after a pause.
            for world in turn:
                found[world.system].append(1000 * world.block(steps))
        found["exchange"] = worlds[0].described
    return found


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--work", action="append", help="one of resnet20, gpt, mlp; all without it")
    args = args_parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # So that the worlds are ended.
    from benchmarks._workloads import WORKLOADS

    rounds, steps, warmup = (3, 5, 3) if args.quick else (15, 12, 10)
    rows, figures = [], {}
    for work in args.work or list(WORKLOADS):
        found = measure(work, rounds=rounds, steps=steps, warmup=warmup)
        against = {other: paired(found["ours"], found[other]) for other in SYSTEMS[1:]}
        best = paired(found["meet"], found["ddp"])
        figures[work] = {
            **found,
            **{f"ours_to_{other}": ratio for other, ratio in against.items()},
            "meet_to_ddp": best,
        }
        chosen = found["exchange"]["num_groups"]
        rows.append(
            [
                WORKLOADS[work].title,
                *[spread(found[system]) for system in SYSTEMS],
                *[str(ratio) for ratio in against.values()],
                str(best),
                str(chosen),
            ]
        )
    head = [
        "work a rank",
        "ours, ms",
        "DDP, ms",
        "wait only, ms",
        "no exchange, ms",
        "ours / DDP",
        "ours / wait only",
        "ours / no exchange",
        "wait only / DDP",
        "chosen groups",
    ]
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {rounds} rounds; a round is the median of {steps} steps of each system, "
        f"one after the other, and the ratios are of the same round. {RANKS} ranks with one thread each, synthetic inputs, "
        "the optimizer's step included. Goal: ours / DDP at most 0.95, which no exchange reaches where wait only / DDP is larger."
    )
    conclude("Step time against DDP", text, figures=figures, args=args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], sys.argv[3], Path(sys.argv[4]), warmup=int(sys.argv[5]))
    else:
        main()
