"""Sparse against dense gradients of an embedding table a hundred times as large as the rest of its model, on two ranks.

Whole ``train`` stages of the click-through model on MovieLens-100k, user and film crossed into a hashed table. The strategies take
turns in one world: all-reduce of dense gradients, all-gather of the rows that were touched, and the parameter server with each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, note, paired, parser, run_in_world, spread, table

RANKS = 2
GLOBAL_BATCH = 256
BUCKETS, _DIM = 2**19, 16
_DATA = {"_target_": "horovod_jobs.data.movielens.movielens", "validation_share": 0.0}
_MODEL = {
    "_target_": "horovod_jobs.models.wide_deep.WideDeep",
    "embedding_dim": _DIM,
    "hidden": [64, 32],
    "crosses": [["user", "item"]],
    "buckets": BUCKETS,
}
_ALLREDUCE = {"_target_": "horovod_jobs.strategy.allreduce.Allreduce", "tune": False}
_SERVER = {"_target_": "horovod_jobs.strategy.parameter_server.ParameterServer", "servers": "colocated"}
# title -> whether gradients are sparse, the strategy
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "all-reduce, dense": (False, _ALLREDUCE),
    "all-reduce, sparse": (True, _ALLREDUCE),
    "parameter server, dense": (False, _SERVER),
    "parameter server, sparse": (True, _SERVER),
}


def rank_main(settings: dict[str, Any], path: Path) -> None:
    """In a rank: every case in turn, several rounds; rank 0 writes what was measured."""
    import torch

    from horovod_jobs.comm.connect import connect
    from horovod_jobs.instantiate import instantiate
    from horovod_jobs.launch import in_rank

    torch.set_num_threads(1)
    in_rank.register_rank()
    world = connect()
    data = instantiate(_DATA, allow=())
    cases = {title: case for title, case in CASES.items() if title.startswith(settings["only"])}
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in cases}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        shared = Path(world.broadcast_json(directory, name="bench.directory"))
        for turn in range(settings["rounds"]):
            for title, (sparse, strategy) in cases.items():
                if world.is_main:
                    note(f"round {turn + 1} of {settings['rounds']}: {title}")
                place = shared / f"{turn}-{'-'.join(title.split())}"
                found[title].append(
                    _train(place, sparse=sparse, strategy=strategy, steps=settings["steps"], world=world, data=data)
                )
        world.barrier(name="bench.end")
    if world.is_main:
        path.write_text(json.dumps(found))
    world.shutdown()
    in_rank.record_exit(0)


def _train(
    directory: Path, *, sparse: bool, strategy: dict[str, Any], steps: int, world: Any, data: Any
) -> dict[str, Any]:
    from horovod_jobs.config import FitConfig, TrainStage
    from horovod_jobs.stages import train

    cfg = TrainStage(
        seed=0,
        model={**_MODEL, "sparse": sparse},
        optimizer={"_target_": "torch.optim.Adagrad", "lr": 0.05},
        schedule={"_target_": "horovod_jobs.training.schedules.Constant"},
        strategy=strategy,
        fit=FitConfig(epochs=1, max_steps=steps, global_batch=GLOBAL_BATCH, checkpoint_every_s=None),
    )
    result = train.run(_context(directory, world=world, data=data), cfg)
    return {**result.metrics, "exchange": result.details["exchange"], "parameters": result.parameters}


def _context(directory: Path, *, world: Any, data: Any) -> Any:
    from horovod_jobs.artifacts import ArtifactStore
    from horovod_jobs.console import Console, EventLog
    from horovod_jobs.footprint import Footprint
    from horovod_jobs.interrupt import StopRequest
    from horovod_jobs.stages.base import StageContext
    from horovod_jobs.tasks.ctr import ClickThrough
    from horovod_jobs.tracking import NullTracker

    staging = directory / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    store = ArtifactStore(directory / "store")
    return StageContext(
        name="bench", fingerprint="0" * 64, world=world, inputs={}, staging=staging, work=store.work("model", "0" * 64),
        run_dir=directory, store=store, data=data, task=ClickThrough(), allow_targets=(), seed=0, log=logging.getLogger("bench"),
        console=Console(is_main=False, mode="none"), events=EventLog(None), tracker=NullTracker(), stop=StopRequest(),
        spent=Footprint.zero,
    )  # fmt: skip


def _bytes_a_step(run: dict[str, Any]) -> int:
    """What a rank gives the exchange in a step; of the parameter server also what it gets back."""
    told = run["exchange"]
    if "bytes_sent_per_step" in told:
        return int(told["bytes_sent_per_step"])
    return round((told["bytes_pushed"] + told["bytes_pulled"]) / run["steps"] / RANKS)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "")
    options.add_argument("--only", default="", help="cases whose name begins so, such as all-reduce")
    args = options.parse_args()
    settings = {"only": args.only, **({"rounds": 1, "steps": 6} if args.quick else {"rounds": 5, "steps": 30})}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        path = Path(directory) / "found.json"
        run_in_world("benchmarks.sparse_embeddings", ["--rank", json.dumps(settings), str(path)], ranks=RANKS)
        found = json.loads(path.read_text())
    reference, runs = next(iter(found.items()))
    first = [run["step_ms"] for run in runs]
    parameters, large = runs[0]["parameters"], BUCKETS * _DIM
    rows = []
    for title, runs in found.items():
        steps_ms = [run["step_ms"] for run in runs]
        ratio = paired(steps_ms, first)
        losses = {round(run["train_loss"], 5) for run in runs}
        rows.append([title, f"{_bytes_a_step(runs[-1]):,}", spread(steps_ms, digits=2),
                     spread([run["exchange_ms"] for run in runs], digits=2), str(ratio),
                     ", ".join(map(str, sorted(losses)))])  # fmt: skip
    head = [
        "gradients",
        "bytes a rank sends a step",
        "step, ms",
        "of it waiting for the exchange, ms",
        f"step / {reference}",
        "train loss",
    ]
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {settings['rounds']} rounds, each a stage of {settings['steps']} steps from "
        f"the same weights. {parameters:,} parameters, of which {large:,} are the hashed table ({large / (parameters - large):.0f} times "
        f"the rest). MovieLens-100k, global batch {GLOBAL_BATCH}, {RANKS} ranks with one thread each on one host, Adagrad. Bytes are the "
        "sizes of the tensors given to the exchange. Equal losses show that all do the same work."
    )
    conclude("Sparse gradients of a large embedding table", text, figures=found, args=args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        rank_main(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
