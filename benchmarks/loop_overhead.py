"""Our fit loop against a loop written by hand on Horovod: same ranks, model, batches, optimizer, schedule and metrics.

Both train in the same world of two ranks and take turns in short blocks. Ours is a ``train`` stage as a job runs it; its strategy
lets the other loop run a block between two of its steps. A block of ours is the time of whole turns of the loop, from one step's
end to another's, so nothing that the loop does is left out (epochs' ends and checkpoints are not in it; there are none here).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import conclude, note, paired, parser, run_in_world, spread, table

RANKS = 2
GLOBAL_BATCH = 128
_OPTIMIZER: dict[str, Any] = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
_CNN = {"_target_": "horovod_jobs.models.cnn.StridedCnn", "widths": [32, 48, 96, 160], "strides": [2, 2, 1, 2]}
_RESNET = {"_target_": "horovod_jobs.models.resnet.ResNet", "depth": 20}
_DATA = {
    "_target_": "horovod_jobs.data.fashion_mnist.fashion_mnist",
    "augment": {"_target_": "horovod_jobs.data.augment.ShiftFlipCrop", "flip": True},
}
# title -> model, synchronised batch norm (in both loops), blocks' steps
CASES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "cnn_teacher": (_CNN, False, 30),
    "cnn_teacher, synchronised batch norm": (_CNN, True, 30),
    "ResNet-20": (_RESNET, False, 8),
}


class Turns:
    """An all-reduce strategy that gives ``other`` a block of steps after every block of the loop it serves."""

    TUNING: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, other: HandLoop, *, world: Any, warmup: int, steps: int) -> None:
        from horovod_jobs.strategy.allreduce import Allreduce

        self._inner, self._other, self._world = Allreduce(tune=False), other, world
        self._warmup, self._steps = warmup, steps
        self.ours_ms: list[float] = []
        self.theirs_ms: list[float] = []
        self._done = 0
        self._since = 0.0

    def environment(self) -> dict[str, str]:
        return {}

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        updater: Any = self._inner.bind(*args, **kwargs)
        # The updater is told when a step has ended: there the other loop takes its turn.
        updater.finish_step = self._finish_step
        return updater

    def _finish_step(self, spent: Any) -> None:
        now = time.perf_counter()
        self._done += 1
        measured = self._done - self._warmup
        if measured < 0 or measured % self._steps:
            return
        if measured:
            self.ours_ms.append(1000 * (now - self._since) / self._steps)
        theirs = self._other.block(self._steps if measured else self._warmup)
        if measured:
            self.theirs_ms.append(1000 * theirs / self._steps)
        self._world.barrier(name="bench.turn")
        self._since = time.perf_counter()


def keep(strategy: Turns) -> Turns:
    """Named as the stage's strategy: the one that is there already."""
    return strategy


class HandLoop:
    """What somebody would write for this one job: plain Horovod, running loss and accuracy, no checkpoints."""

    def __init__(self, model: Any, *, data: Any, world: Any, schedule: Callable[[int], float], seed: int) -> None:
        import horovod.torch as hvd
        import torch

        from horovod_jobs.data.sharding import epoch_permutation

        self.model, self._world, self._data, self._seed = model, world, data, seed
        plain = torch.optim.SGD(
            model.parameters(), **{key: value for key, value in _OPTIMIZER.items() if key != "_target_"}
        )
        # Made before Horovod's wrapper: a scheduler would otherwise look for a step method that is not there.
        self._schedule = torch.optim.lr_scheduler.LambdaLR(plain, schedule)
        self.optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
        self.optimizer.param_groups = plain.param_groups
        plain._opt_called = True  # type: ignore[attr-defined]  # The scheduler cannot see that the wrapper steps.
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        order = epoch_permutation(len(data.train), seed=seed, epoch=0)
        self._plan: Iterator[Any] = iter(order.split(GLOBAL_BATCH))
        self.loss, self.correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        self.seen = 0

    def block(self, steps: int) -> float:
        """Seconds of so many steps."""
        from torch.nn import functional

        self._world.barrier(name="bench.hand")
        start = time.perf_counter()
        share = GLOBAL_BATCH // self._world.size
        first = self._world.rank * share
        for _ in range(steps):
            indices = next(self._plan)[first : first + share]
            batch = self._data.train.fetch(indices)
            inputs = self._data.augment(batch.inputs, seed=self._seed, epoch=0, indices=indices)
            self.optimizer.zero_grad()
            outputs = self.model(inputs)
            loss = functional.cross_entropy(outputs, batch.targets)
            loss.backward()
            self.optimizer.step()
            self._schedule.step()
            self.loss += loss.detach() * share
            self.correct += (outputs.argmax(1) == batch.targets).sum()
            self.seen += share
        return time.perf_counter() - start


def rank_main(settings: dict[str, Any], path: Path) -> None:
    """In a rank: every case in turn; rank 0 writes what was measured."""
    import torch

    from horovod_jobs.comm.connect import connect
    from horovod_jobs.instantiate import instantiate
    from horovod_jobs.launch import in_rank

    torch.set_num_threads(1)
    in_rank.register_rank()
    world = connect()
    data = instantiate(_DATA, allow=())
    found = {}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        shared = Path(world.broadcast_json(directory, name="bench.directory"))
        for number, (title, (model, synchronised, steps)) in enumerate(CASES.items()):
            if world.is_main:
                note(title)
            found[title] = _measure(model, synchronised, shared / str(number), world=world, data=data,
                                    steps=min(steps, settings["steps"]), warmup=settings["warmup"],
                                    rounds=settings["rounds"])  # fmt: skip
        world.barrier(name="bench.end")
    if world.is_main:
        path.write_text(json.dumps(found))
    world.shutdown()
    in_rank.record_exit(0)


def _measure(node: dict[str, Any], synchronised: bool, directory: Path, *, world: Any, data: Any, steps: int, warmup: int,
             rounds: int) -> dict[str, Any]:  # fmt: skip
    from horovod_jobs.config import FitConfig, TrainStage
    from horovod_jobs.stages import train
    from horovod_jobs.training.batchnorm import synchronise
    from horovod_jobs.training.schedules import OneCycle

    total = warmup + rounds * steps
    schedule = {"_target_": "horovod_jobs.training.schedules.OneCycle"}
    ctx = _context(directory, world=world, data=data)
    fit = FitConfig(
        epochs=1, max_steps=total, global_batch=GLOBAL_BATCH, sync_batchnorm=synchronised, checkpoint_every_s=None
    )
    cfg = TrainStage(seed=0, model=node, optimizer=_OPTIMIZER, schedule=schedule, strategy=None, fit=fit)
    twin = train.build_model(ctx, cfg)
    if synchronised:
        synchronise(twin, world=world)
    per_epoch = -(-len(data.train) // GLOBAL_BATCH)
    curve = OneCycle()
    hand = HandLoop(twin, data=data, world=world, seed=0,
                    schedule=lambda step: curve.factor(min(step, total), total=total, steps_per_epoch=per_epoch))  # fmt: skip
    turns = Turns(hand, world=world, warmup=warmup, steps=steps)
    cfg.strategy = {"_target_": "benchmarks.loop_overhead.keep", "strategy": turns}
    result = train.run(ctx, cfg)
    ours, theirs = result.details["history"][0]["train_loss"], float(hand.loss) / hand.seen
    everyone = world.gather_json(theirs, name="bench.loss")
    return {"ours_ms": turns.ours_ms, "hand_ms": turns.theirs_ms, "steps": steps, "train_loss": ours,
            "hand_train_loss": sum(everyone) / len(everyone)}  # fmt: skip


def _context(directory: Path, *, world: Any, data: Any) -> Any:
    from horovod_jobs.artifacts import ArtifactStore
    from horovod_jobs.console import Console, EventLog
    from horovod_jobs.footprint import Footprint
    from horovod_jobs.interrupt import StopRequest
    from horovod_jobs.stages.base import StageContext
    from horovod_jobs.tasks.classification import Classification
    from horovod_jobs.tracking import NullTracker

    staging = directory / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    store = ArtifactStore(directory / "store")
    return StageContext(
        name="bench", fingerprint="0" * 64, world=world, inputs={}, staging=staging, work=store.work("model", "0" * 64),
        run_dir=directory, store=store, data=data, task=Classification(num_classes=data.num_classes), allow_targets=("benchmarks",),
        seed=0, log=logging.getLogger("bench"), console=Console(is_main=False, mode="none"), events=EventLog(None),
        tracker=NullTracker(), stop=StopRequest(), spent=Footprint.zero,
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    args = parser(__doc__ or "").parse_args()
    settings = {"warmup": 3, "rounds": 3, "steps": 3} if args.quick else {"warmup": 10, "rounds": 13, "steps": 30}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        path = Path(directory) / "found.json"
        run_in_world("benchmarks.loop_overhead", ["--rank", json.dumps(settings), str(path)], ranks=RANKS)
        found = json.loads(path.read_text())
    rows = []
    for title, case in found.items():
        case["ours_to_hand"] = paired(case["ours_ms"], case["hand_ms"])
        rows.append([title, spread(case["ours_ms"], digits=2), spread(case["hand_ms"], digits=2), str(case["ours_to_hand"]),
                     f"{case['train_loss']:.4f}", f"{case['hand_train_loss']:.4f}"])  # fmt: skip
    head = ["model", "ours, ms a step", "by hand, ms a step", "ours / by hand", "train loss, ours", "by hand"]
    text = (
        f"{table(head, rows)}\n\nMedian (smallest..largest) of {settings['rounds']} rounds; a round is the mean step of a block of each, "
        f"one after the other. Fashion-MNIST, global batch {GLOBAL_BATCH}, {RANKS} ranks with one thread each, no tuning of the exchange. "
        "The equal losses show that both do the same work. Goal: ours / by hand at most 1.02."
    )
    conclude("The fit loop against a loop by hand", text, figures=found, args=args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        rank_main(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
