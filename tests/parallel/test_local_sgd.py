"""Local SGD under real ranks: against its algorithm written by hand, against all-reduce, cut off, and with a rank that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.comm.world import World
from horovod_jobs.data.sharding import epoch_permutation, micro_batches
from horovod_jobs.errors import ConfigError, Interrupted, NonFiniteError
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.strategy.local_sgd import LocalSgd, LocalSgdUpdater
from horovod_jobs.training.state import seed_step
from tests.support import ALLREDUCE, blob_data, context, fit_config, train_stage

PLAIN = {"_target_": "torch.optim.SGD", "lr": 0.05}
MOMENTUM = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
ADAM = {"_target_": "torch.optim.AdamW", "lr": 0.01}
CONSTANT = {"_target_": "horovod_jobs.training.schedules.Constant"}


class Flat(torch.nn.Module):
    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


FLAT = {"_target_": f"{__name__}.Flat"}


class StopAt(StopRequest):
    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def code(self) -> int:
        self._left -= 1
        return 1 if self._left <= 0 else 0


class Watched(LocalSgd):
    """Local SGD that notes after each step how far the ranks' parameters are apart, by a collective of its own."""

    apart: tuple[list[float], ...] = ([],)

    def bind(self, optimizer: Any, named_parameters: Any, setting: Any) -> LocalSgdUpdater:
        named = list(named_parameters)
        made = super().bind(optimizer, named, setting)
        self.apart[0].clear()

        def finish_step(spent: Any) -> None:
            flat = torch.cat([parameter.detach().reshape(-1) for _, parameter in named])
            low, high = (setting.world.allreduce(flat, name=f"test.{op}", op=op) for op in ("min", "max"))
            self.apart[0].append(float((high - low).max()))

        made.finish_step = finish_step  # type: ignore[method-assign]
        return made


def local(**settings: Any) -> dict[str, Any]:
    return {"_target_": "horovod_jobs.strategy.local_sgd.LocalSgd", **settings}


def run(
    directory: Path, world: World, strategy: dict[str, Any], *, samples: int = 103, stop: StopRequest | None = None,
    model: Any = None, optimizer: Any = MOMENTUM, **fit: Any
) -> tuple[dict[str, Tensor], StageResult]:  # fmt: skip
    ctx = context(directory, world=world, data=blob_data(samples), stop=stop)
    chosen = {"model": model} if model is not None else {}
    config = fit_config(sync_batchnorm=False, **fit)
    stage = train_stage(fit=config, strategy=strategy, optimizer=optimizer, schedule=CONSTANT, **chosen)
    result = train.run(ctx, stage)
    return load_file(ctx.staging / "model.safetensors"), result


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor], *, atol: float = 1e-5) -> None:
    for key, value in wanted.items():
        assert torch.allclose(ours[key].double(), value.double(), rtol=1e-4, atol=atol), key


@pytest.mark.parametrize("samples", [103, 97])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(PLAIN, {}), (MOMENTUM, {"average_state": True}), (MOMENTUM, {"average_state": False})],
    ids=["plain", "momentum averaged", "momentum of each rank"],
)
def test_a_period_of_one_is_all_reduce(
    world: World, shared_dir: Path, optimizer: Any, settings: dict[str, Any], samples: int
) -> None:
    """The update is linear in the gradient, momentum and weight decay included. 97 samples: a last batch of one, on one rank."""
    ours, result = run(shared_dir / "a", world, local(period=1, **settings), optimizer=optimizer, samples=samples)
    wanted, straight = run(shared_dir / "b", world, ALLREDUCE, optimizer=optimizer, samples=samples)
    assert_close(ours, wanted)
    for got, want in zip(result.details["history"], straight.details["history"], strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
        assert got["validation_loss"] == pytest.approx(want["validation_loss"], rel=1e-3)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adamw"])
@pytest.mark.parametrize("average_state", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_it_is_the_algorithm_written_by_hand(
    world: World, shared_dir: Path, optimizer: dict[str, Any], average_state: bool, start: int
) -> None:
    """All ranks' models in one process: own steps, and an average after three steps and at an epoch's end."""
    ours, _ = run(shared_dir, world, local(period=3, start_step=start, average_state=average_state), model=FLAT,
                  optimizer=optimizer)  # fmt: skip
    models = [Flat(num_classes=3) for _ in range(world.size)]
    seed_step(0, -1, 0)
    first = Flat(num_classes=3).state_dict()
    arguments = {key: value for key, value in optimizer.items() if key != "_target_"}
    made = torch.optim.AdamW if optimizer is ADAM else torch.optim.SGD
    for model in models:
        model.load_state_dict(first)
    optimizers = [made(model.parameters(), **arguments) for model in models]
    data, step, since = blob_data(103).train, 0, 0
    for epoch in range(2):
        for batch in epoch_permutation(103, seed=0, epoch=epoch).split(24):
            losses = []
            for rank, model in enumerate(models):
                optimizers[rank].zero_grad()
                mine = data.fetch(micro_batches(batch, rank=rank, size=world.size, accumulate=1)[0])
                loss = torch.nn.functional.cross_entropy(model(mine.inputs), mine.targets, reduction="sum") / len(batch)
                (loss * world.size).backward()
                losses.append([parameter.grad for parameter in model.parameters()])
            step, since = step + 1, since + 1
            if step <= start:
                for grads in zip(*losses, strict=True):
                    mean = sum(grads) / world.size
                    for grad in grads:
                        grad.copy_(mean)
            for each in optimizers:
                each.step()
            if since == 3 or step in (5, 10) or step <= start:
                since = 0
                groups = [list(model.parameters()) for model in models]
                if average_state:
                    groups = [
                        [*mine, *(v for p in mine for v in o.state[p].values() if v is not None and v.dim())]
                        for mine, o in zip(groups, optimizers, strict=True)
                    ]
                with torch.no_grad():
                    for tensors in zip(*groups, strict=True):
                        mean = sum(tensors) / world.size
                        for tensor in tensors:
                            tensor.copy_(mean)
    assert_close(ours, models[0].state_dict(), atol=1e-4 if optimizer is ADAM else 1e-5)


def test_post_local_is_all_reduce_to_the_last_bit_until_it_starts_and_local_after(
    world: World, shared_dir: Path
) -> None:
    watched = {"_target_": f"{__name__}.Watched", "period": 3}
    first, _ = run(shared_dir / "a", world, {**watched, "start_step": 4}, max_steps=4)
    wanted, _ = run(shared_dir / "b", world, {**ALLREDUCE, "tune": False}, max_steps=4)
    assert all(torch.allclose(first[key], wanted[key], atol=0 if world.size == 2 else 1e-6) for key in wanted)
    run(shared_dir / "c", world, {**watched, "start_step": 4}, epochs=3)
    boundaries = [step for step, apart in enumerate(Watched.apart[0], start=1) if apart == 0.0]
    # 5 steps an epoch, 15 in all: the end of an epoch is a boundary, and a period begins anew there.
    assert boundaries == [1, 2, 3, 4, 5, 8, 10, 13, 15]
    assert all(apart > 1e-4 for step, apart in enumerate(Watched.apart[0], start=1) if step not in boundaries)


def test_between_boundaries_the_world_is_silent(
    world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    methods = ("allreduce_async", "allreduce", "sum_in_order_async", "gather_bytes", "broadcast")
    real = {name: getattr(type(world), name) for name in methods}
    for method, original in real.items():

        def call(self: Any, *args: Any, name: str, _original: Any = original, **rest: Any) -> Any:
            if names[-1:] != [name]:  # One method may be made of another.
                names.append(name)
            return _original(self, *args, name=name, **rest)

        monkeypatch.setattr(type(world), method, call)
    run(shared_dir, world, local(period=4), epochs=1, validate_every_epochs=0, samples=24 * 10, model=FLAT)
    steps = [name for name in names if name.startswith(("fit.control", "strategy."))]
    assert steps == ["fit.control", "strategy.local_sgd.torch.float32"] * 3, "10 steps: after 4, 8 and 10"


@pytest.mark.parametrize("average_state", [False, True])
@pytest.mark.parametrize(("asked", "stopped"), [(4, 5), (6, 8), (8, 8)])
def test_a_stop_waits_for_the_boundary_and_resuming_is_exact(
    world: World, shared_dir: Path, average_state: bool, asked: int, stopped: int
) -> None:
    """With batch norm of each rank, whose statistics and, where it is not averaged, momentum are each rank's own."""
    strategy = local(period=3, average_state=average_state)
    whole, straight = run(shared_dir / "a", world, strategy, epochs=3)
    stop = StopAt(asked) if world.rank == world.size - 1 else None
    with pytest.raises(Interrupted, match=f"after step {stopped} of 15"):
        run(shared_dir / "b", world, strategy, epochs=3, stop=stop)
    resumed, result = run(shared_dir / "b", world, strategy, epochs=3)
    assert result.resumed_from_step == stopped
    if world.size == 2:
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    else:
        assert_close(resumed, whole)
    assert result.details["exchange"] == straight.details["exchange"], "averagings and bytes count on"


def test_a_checkpoint_that_falls_due_between_boundaries_is_written_at_the_next(world: World, shared_dir: Path) -> None:
    ctx = context(shared_dir, world=world)
    stop = StopAt(12) if world.rank == 0 else None
    with pytest.raises(Interrupted, match="after step 13 of 15"):
        run(shared_dir, world, local(period=3), epochs=3, checkpoint_every_steps=2, checkpoint_keep=9, stop=stop)
    steps = world.main(lambda: sorted(int(path.name[5:]) for path in ctx.work.glob("step-*")), name="test.steps")
    # Boundaries are 3, 5, 8, 10, 13; due at 2, 4, 6, 8, 10, 12.
    assert steps == [3, 5, 8, 10, 13]


@pytest.mark.parametrize("bad_batch", [0, 3])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_the_boundary(
    world: World, shared_dir: Path, bad_batch: int
) -> None:
    """Boundaries are after batches 3 and 5: also in what is left of the run after the last whole period."""
    data = blob_data()
    first = epoch_permutation(103, seed=0, epoch=0).split(24)[bad_batch][0]
    data.train._inputs[int(first)] = float("nan")
    ctx = context(shared_dir, world=world, data=data)
    with pytest.raises(NonFiniteError, match=r"on rank 0, training samples"):
        train.run(ctx, train_stage(strategy=local(period=3), fit=fit_config(sync_batchnorm=False, epochs=1)))
    assert not list(ctx.staging.iterdir())


def test_it_learns(world: World, shared_dir: Path) -> None:
    _, result = run(shared_dir, world, local(period=4, start_fraction=0.25), epochs=6)
    losses = [entry["train_loss"] for entry in result.details["history"]]
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["validation_accuracy"] > 0.8


def test_bytes_are_those_of_the_tensors_sent(world: World, shared_dir: Path) -> None:
    weights, result = run(shared_dir, world, local(period=3, start_step=2), model=FLAT, epochs=1)
    told = result.details["exchange"]
    numbers = sum(tensor.numel() for tensor in weights.values())
    assert (told["allreduce_steps"], told["averagings"]) == (2, 1), "steps 1 and 2, and the epoch's end at step 5"
    assert (told["bytes_sent"], told["bytes_uncompressed"]) == (4 * numbers * 3, 4 * numbers * 5)


def test_synchronised_batch_norm_is_refused_by_all(world: World, shared_dir: Path) -> None:
    ctx = context(shared_dir, world=world)
    with pytest.raises(ConfigError, match="set fit.sync_batchnorm=false"):
        train.run(ctx, train_stage(strategy=local(period=4)))
