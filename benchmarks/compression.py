"""Gradient compression: bytes and time of a step by method, at full speed and over shaped links, and accuracy after the same epochs.

Steps: one world in which every method has a model of its own; methods take turns in short blocks, and a ratio is always of two
blocks of the same round. ``--rate 1000 --rate 100`` runs the same over hosts that are network namespaces with links of that many
Mbit/s (root, Linux); there the bytes that really left a host's interface are read from the kernel beside those that were counted.
Accuracy: every method trains the same model from the same weights on the same batches with the same rates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, note, paired, parser, run_in_world, table
from horovod_jobs.errors import SetupError

RANKS, BATCH = 2, 64
_HERE = "horovod_jobs.strategy.compression"
WARMED = "topk 1 %, warm-up of 2 epochs"
# name -> what strategy.compression is. Default arguments but for the warm-up, whose four epochs a short run would not leave.
METHODS: dict[str, Any] = {
    "none": "none",
    "fp16": "fp16",
    "bf16": "bf16",
    "topk 1 %": {"_target_": f"{_HERE}.topk.TopK", "warmup_epochs": 0},
    WARMED: {"_target_": f"{_HERE}.topk.TopK", "warmup_epochs": 2},
    "topk 1 %, no masking": {"_target_": f"{_HERE}.topk.TopK", "warmup_epochs": 0, "momentum_masking": False},
    "randomk 10 %": "randomk",
    "onebit": "onebit",
    "sign": "sign",
    "qsgd 4 bits": "qsgd",
    "powersgd rank 2": "powersgd",
}
# After its warm-up a step is one of the row above it.
TIMED = tuple(name for name in METHODS if name != WARMED)
PARTS = ("steps", "accuracy")
DATA: dict[str, dict[str, Any]] = {
    "digits": {"node": {"_target_": "horovod_jobs.data.digits.digits"}, "hidden": [128], "batch": 64, "epochs": 12},
    "fashion_mnist": {
        "node": {"_target_": "horovod_jobs.data.fashion_mnist.fashion_mnist"},
        "hidden": [256, 128],
        "batch": 256,
        "epochs": 4,
    },
}


# --- in a rank --------------------------------------------------------------------------------------------------------
def rank_main(spec: dict[str, Any], path: Path) -> None:
    """One rank: what ``spec['kind']`` names; rank 0 writes what was found."""
    import torch

    from horovod_jobs.comm.connect import connect
    from horovod_jobs.launch import in_rank

    torch.set_num_threads(1)
    if spec["launched"]:
        in_rank.register_rank()
    world = connect()
    found = _steps(world, spec) if spec["kind"] == "steps" else _accuracy(world, spec)
    if world.is_main:
        path.write_text(json.dumps(found))
    world.barrier(name="bench.end")
    world.shutdown()
    if spec["launched"]:
        in_rank.record_exit(0)


def _updater(name: str, model: Any, world: Any, *, rate: float, steps_per_epoch: int) -> tuple[Any, Any]:
    import torch

    from horovod_jobs.instantiate import instantiate
    from horovod_jobs.strategy.base import Setting

    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    node = {"_target_": "horovod_jobs.strategy.allreduce.Allreduce", "compression": METHODS[name], "tune": False}
    setting = Setting(world, steps_per_epoch=steps_per_epoch)
    return optimizer, instantiate(node).bind(optimizer, model.named_parameters(), setting)


def _steps(world: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step of every round, bytes counted, and bytes that left this host, by method."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    inputs, targets = torch.randn(spec["batch"], 784), torch.randint(10, (spec["batch"],))
    runs = {}
    for name in TIMED:
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
        model = nn.Sequential(*layers)
        runs[name] = (model, _updater(name, model, world, rate=0.001, steps_per_epoch=1000)[1])

    def block(name: str, steps: int) -> float:
        model, updater = runs[name]
        world.barrier(name="bench.block")
        start = time.perf_counter()
        for _ in range(steps):
            updater.zero_grad()
            (cross_entropy(model(inputs), targets) / world.size).backward()
            updater.synchronize()
            updater.step()
        mean = torch.tensor((time.perf_counter() - start) / steps, dtype=torch.float64)
        return float(world.allreduce(mean, name="bench.slowest", op="max"))

    found: dict[str, Any] = {name: {"seconds": [], "left_bytes": 0} for name in TIMED}
    for name in TIMED:
        block(name, 2)
    for number in range(spec["rounds"]):
        for name in TIMED if number % 2 == 0 else reversed(TIMED):
            before = _left_bytes()
            found[name]["seconds"].append(block(name, spec["steps"]))
            found[name]["left_bytes"] += _left_bytes() - before
    for name, (_, updater) in runs.items():
        told = updater.describe()
        steps = 2 + spec["rounds"] * spec["steps"]
        found[name].update(
            sent_bytes=told["bytes_sent"] / steps,
            ring_bytes=told["bytes_sent_by_ring"] / steps,
            left_bytes=found[name]["left_bytes"] / (spec["rounds"] * spec["steps"]),
        )
        updater.close()
    return found


def _left_bytes() -> int:
    """Bytes that have left this host's one interface, as the kernel counts; 0 where it has none of its own."""
    if os.environ.get("BENCH_SHAPED") != "1":
        return 0
    # Not /sys/class/net, which shows the interfaces of the namespace that it was mounted in.
    lines = [line.split() for line in Path("/proc/self/net/dev").read_text().splitlines()]
    return next(int(words[9]) for words in lines if words and words[0] == "eth0:")


def _accuracy(world: Any, spec: dict[str, Any]) -> dict[str, list[float]]:
    """Accuracy on the test split by method, one of each seed."""
    import torch
    from torch.nn.functional import cross_entropy

    from horovod_jobs.data.sharding import epoch_permutation, micro_batches
    from horovod_jobs.instantiate import instantiate
    from horovod_jobs.models.mlp import Mlp

    work = DATA[spec["data"]]
    data = instantiate(work["node"])
    test = data.test.fetch(torch.arange(len(data.test)))
    per_epoch = math.ceil(len(data.train) / work["batch"])
    total = per_epoch * spec["epochs"]
    found: dict[str, list[float]] = {name: [] for name in spec["methods"]}
    for seed in range(spec["seeds"]):
        for name in found:
            torch.manual_seed(seed)
            model = Mlp(num_classes=10, input_shape=tuple(data.input_shape), hidden=work["hidden"])
            optimizer, updater = _updater(name, model, world, rate=0.0, steps_per_epoch=per_epoch)
            step = 0
            for epoch in range(spec["epochs"]):
                for indices in epoch_permutation(len(data.train), seed=seed, epoch=epoch).split(work["batch"]):
                    # Up in a tenth of the steps, then down with a cosine.
                    rise = min(1.0, 10 * (step + 1) / total)
                    optimizer.param_groups[0]["lr"] = spec["rate"] * rise * (1 + math.cos(math.pi * step / total)) / 2
                    updater.zero_grad()
                    for part in micro_batches(indices, rank=world.rank, size=world.size, accumulate=1, shares=None):
                        batch = data.train.fetch(part)
                        (cross_entropy(model(batch.inputs), batch.targets, reduction="sum") / len(indices)).backward()
                    updater.synchronize()
                    updater.step()
                    step += 1
            updater.close()
            model.eval()
            with torch.no_grad():
                found[name].append(float((model(test.inputs).argmax(1) == test.targets).float().mean()))
            if world.is_main:
                note(f"{spec['data']} seed {seed} {name}: {found[name][-1]:.4f}")
    return found


# --- in the parent ----------------------------------------------------------------------------------------------------
def in_world(spec: dict[str, Any]) -> dict[str, Any]:
    """Run it on two ranks of this host."""
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        path = Path(directory) / "found.json"
        run_in_world(
            "benchmarks.compression", ["--rank", json.dumps({**spec, "launched": True}), str(path)], ranks=RANKS
        )
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def on_links(spec: dict[str, Any], *, hosts_count: int, rate_mbit: float) -> dict[str, Any]:
    """Run it on hosts with links of this rate, one rank each.

    Raises:
        SetupError: hosts cannot be made here, or a rank failed.
    """
    from benchmarks.hosts import hosts
    from benchmarks.network import METHODS as REDUCTIONS
    from benchmarks.network import TUNED, mpi

    with hosts(hosts_count, rate_mbit=rate_mbit) as made:
        path = made.directory / "found.json"
        launcher = [*mpi(made, hosts_count, *REDUCTIONS[TUNED]), "-x", "BENCH_SHAPED"]
        command = [
            sys.executable,
            "-m",
            "benchmarks.compression",
            "--rank",
            json.dumps({**spec, "launched": False}),
            str(path),
        ]
        passed = ("PATH", "HOME", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in passed if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "BENCH_SHAPED": "1"}
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        try:
            done = made.run([*launcher, *command], env=env, timeout_s=900)
        except subprocess.TimeoutExpired as error:
            raise SetupError(f"{hosts_count} hosts at {rate_mbit:g} Mbit/s did not end in 900 s") from error
        if done.returncode or not path.exists():
            raise SetupError(f"{hosts_count} hosts failed ({done.returncode}): {done.stdout.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def _column(found: dict[str, Any], name: str) -> str:
    """Milliseconds a step, and the ratio to ``none`` of the same rounds."""
    mine, plain = found[name]["seconds"], found["none"]["seconds"]
    return f"{1000 * statistics.median(mine):.1f}, x{paired(mine, plain).median:.2f}"


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument(
        "--rate", type=float, action="append", default=[], help="Mbit/s of shaped links; more than once"
    )
    args_parser.add_argument("--hosts", type=int, default=RANKS, help="hosts with shaped links")
    args_parser.add_argument("--data", action="append", choices=list(DATA), help="train on these; digits without it")
    args_parser.add_argument("--seeds", type=int, default=3, help="training runs of each method")
    args_parser.add_argument("--lr", type=float, default=0.05, help="largest learning rate of the training runs")
    args_parser.add_argument("--only", choices=PARTS, help="one part; both without it")
    args_parser.add_argument(
        "--method", action="append", choices=list(METHODS), help="train with these; all without it"
    )
    args = args_parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    quick = args.quick
    figures = {} if args.only == "accuracy" else measure_steps(args)
    learnt = {}
    for data in () if args.only == "steps" else args.data or ["digits"]:
        seeds, epochs = (1, 1) if quick else (args.seeds, DATA[data]["epochs"])
        learnt[data] = in_world({"kind": "accuracy", "data": data, "seeds": seeds, "epochs": epochs, "rate": args.lr,
                                 "methods": args.method or list(METHODS)})  # fmt: skip
    text = "\n\n".join(
        [*([steps_text(figures, args)] if figures else []), *([accuracy_text(learnt, args)] if learnt else [])]
    )
    conclude("Gradient compression", text, figures={**figures, "accuracy": learnt}, args=args)


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Time and bytes of a step by method, at full speed and at every rate."""
    spec = {"kind": "steps", "batch": BATCH, "rounds": 2 if args.quick else 9, "steps": 2 if args.quick else 5}
    note("steps at full speed")
    figures: dict[str, Any] = {"full speed": in_world(spec)}
    for rate in args.rate:
        note(f"steps over {args.hosts} hosts at {rate:g} Mbit/s")
        slow = {**spec, "rounds": 2 if args.quick else 3, "steps": 2 if args.quick else 3}
        figures[f"{rate:g} Mbit/s"] = on_links(slow, hosts_count=args.hosts, rate_mbit=rate)
    return figures


def steps_text(figures: dict[str, Any], args: argparse.Namespace) -> str:
    """Tables of time and bytes."""
    whole = figures["full speed"]["none"]["sent_bytes"]
    rows = []
    for name in TIMED:
        sent = figures["full speed"][name]["sent_bytes"]
        rows.append(
            [name, f"{sent:,.0f}", f"1/{whole / sent:.1f}", *[_column(found, name) for found in figures.values()]]
        )
    text = table(["method", "bytes a step", "of none", *[f"{kind}, ms" for kind in figures]], rows)
    for kind in [kind for kind in figures if kind != "full speed"]:
        left = [[name, f"{row['ring_bytes']:,.0f}", f"{row['left_bytes']:,.0f}", f"{row['left_bytes'] / row['ring_bytes']:.3f}"]
                for name, row in figures[kind].items()]  # fmt: skip
        text += f"\n\nBytes a step that left a host at {kind}:\n\n" + table(
            ["method", "counted", "the kernel's", "ratio"], left
        )
    return (
        f"{text}\n\nMLP 784-1024-1024-10, batch {BATCH} a rank, SGD with momentum, {RANKS} ranks with one thread each "
        f"({args.hosts} hosts where links are shaped): median step of the slower rank, and the median of its ratios to `none` in the "
        "same rounds."
    )


def accuracy_text(learnt: dict[str, Any], args: argparse.Namespace) -> str:
    """Accuracy of every method on every data set, mean and range of the seeds."""
    rows = []
    for name in args.method or METHODS:
        values = [[100 * value for value in found[name]] for found in learnt.values()]
        rows.append([name, *[f"{statistics.mean(one):.2f} ({min(one):.2f}..{max(one):.2f})" for one in values]])
    lengths = ", ".join(f"{data} {DATA[data]['epochs']} epochs" for data in learnt)
    return (
        f"{table(['method', *[f'{data}, %' for data in learnt]], rows)}\n\nAccuracy on the test split, mean (smallest..largest) of "
        f"{1 if args.quick else args.seeds} seeds: an MLP, {lengths}, SGD with momentum 0.9, largest rate {args.lr:g}; all methods have "
        "the same settings."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
