"""Training stages with a parameter server: the same loss curve, agreed stops, and checkpoints that any number of servers can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.errors import ConfigError, Interrupted, NonFiniteError
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from tests.parallel.subworld import SubWorld, within
from tests.parallel.test_training import StopAt
from tests.support import ALLREDUCE, blob_data, context, fit_config, train_stage

TARGET = "horovod_jobs.strategy.parameter_server.ParameterServer"
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}


def run(directory: Path, world: World, *, stop: StopRequest | None = None, data: Any = None, strategy: dict[str, Any],
        optimizer: dict[str, Any] | None = None, **fit: Any) -> tuple[dict[str, Tensor], StageResult]:  # fmt: skip
    ctx = context(directory, world=world, data=data or blob_data(), stop=stop)
    changes = {"optimizer": optimizer} if optimizer is not None else {}
    result = train.run(ctx, train_stage(fit=fit_config(**fit), strategy=strategy, **changes))
    return load_file(ctx.staging / "model.safetensors"), result


def server(**arguments: Any) -> dict[str, Any]:
    return {"_target_": TARGET, "chunk_kb": 1, **arguments}


def sizes(world: World, *, workers: int, servers: int) -> tuple[int, int | str]:
    if world.size < workers + servers:
        pytest.skip(f"wants {workers + servers} ranks, and there are {world.size}")
    return servers, servers or "colocated"


@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.1}, {"ema_decay": 0.9}, {"accumulate": 2, "sync_batchnorm": False}], ids=str
)
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 0), (2, 1)])
def test_sync_has_the_loss_curve_of_one_process(
    world: World, shared_dir: Path, workers: int, servers: int, settings: dict[str, Any]
) -> None:
    servers, asked = sizes(world, workers=workers, servers=servers)
    if workers > 1 and "accumulate" in settings:
        pytest.skip("batch norm sees parts of a batch, which are cut differently for two workers")

    def check(sub: SubWorld) -> None:
        ours, result = run(shared_dir / "ours", sub, strategy=server(servers=asked), **settings)
        wanted, straight = run(shared_dir / f"alone-{sub.rank}", SingleWorld(), strategy=ALLREDUCE, **settings)
        for key, value in wanted.items():
            assert torch.allclose(ours[key].double(), value.double(), rtol=1e-3, atol=5e-4), key
        for got, want in zip(result.details["history"], straight.details["history"], strict=True):
            assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
        told = result.details["exchange"]
        if "ema_decay" not in settings:
            assert told["waited_for_at_the_beginning"] == 0, "every layer waits for its own parameters"

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize(("workers", "before", "after"), [(1, 1, 1), (2, 0, 0), (2, 0, 1), (2, 1, 2), (2, 2, 0)])
def test_a_stopped_stage_goes_on_with_any_number_of_servers(
    world: World, shared_dir: Path, workers: int, before: int, after: int
) -> None:
    _, asked = sizes(world, workers=workers, servers=before)
    _, then = sizes(world, workers=workers, servers=after)

    def first(sub: SubWorld) -> dict[str, Tensor]:
        whole, _ = run(shared_dir / "whole", sub, strategy=server(servers=asked), optimizer=ADAM)
        stop = StopAt(7) if sub.rank == sub.size - 1 else None
        with pytest.raises(Interrupted, match="after step 7 of 10"):
            run(shared_dir / "cut", sub, strategy=server(servers=asked), optimizer=ADAM, stop=stop)
        return whole

    whole = within(world, first, workers=workers, servers=before)

    def second(sub: SubWorld) -> None:
        assert whole is not None
        resumed, result = run(shared_dir / "cut", sub, strategy=server(servers=then), optimizer=ADAM)
        assert result.resumed_from_step == 7
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), key

    within(world, second, workers=workers, servers=after)


def test_another_strategy_reads_its_checkpoint(world: World, shared_dir: Path) -> None:
    """The optimizer's state in it is what torch writes."""
    _, asked = sizes(world, workers=2, servers=0)

    def check(sub: SubWorld) -> None:
        with pytest.raises(Interrupted):
            run(shared_dir, sub, strategy=server(servers=asked), optimizer=ADAM, stop=StopAt(7), sync_batchnorm=False)
        if sub.is_main:
            saved = torch.load(next((shared_dir).rglob("step-*/state.pt")), weights_only=True)["optimizer"]
            optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(4, 1, 3, 3))] + [
                torch.nn.Parameter(torch.zeros(shape)) for shape in ((4,), (4,), (4,), (3, 144), (3,))])  # fmt: skip
            optimizer.load_state_dict(saved)
            shapes = [tuple(entry["exp_avg_sq"].shape) for entry in optimizer.state.values()]
            assert shapes == [(4, 1, 3, 3), (4,), (4,), (4,), (3, 144), (3,)]
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {7.0}

    within(world, check, workers=2)


@pytest.mark.parametrize("consistency", ["async", "ssp"])
@pytest.mark.parametrize("averaging", ["gradients", "weights"])
@pytest.mark.parametrize("servers", [0, 1])
def test_workers_out_of_step_learn_stop_together_and_go_on(
    world: World, shared_dir: Path, servers: int, averaging: str, consistency: str
) -> None:
    _, asked = sizes(world, workers=2, servers=servers)
    strategy = server(servers=asked, consistency=consistency, averaging=averaging)
    common: dict[str, Any] = {"strategy": strategy, "sync_batchnorm": False, "clip_norm": 5.0, "epochs": 4}

    def check(sub: SubWorld) -> None:
        stop = StopAt(7) if sub.rank == 1 else None
        with pytest.raises(Interrupted) as caught:
            run(shared_dir, sub, stop=stop, checkpoint_every_steps=3, **common)
        told = sub.gather_json(str(caught.value), name="test.told")
        assert len(set(told)) == 1, "all stop in the same step"
        stopped = int(told[0].split("after step ")[1].split()[0])
        assert stopped >= 7
        weights, result = run(shared_dir, sub, **common)
        assert result.resumed_from_step == stopped
        assert result.details["history"][-1]["validation_accuracy"] > 0.8
        assert len(result.details["history"]) == 4
        assert all(torch.isfinite(value.double()).all() for value in weights.values())

    within(world, check, workers=2, servers=servers)


@pytest.mark.parametrize("consistency", ["sync", "async"])
@pytest.mark.parametrize("servers", [0, 1])
def test_a_non_finite_loss_of_one_worker_stops_all_and_names_it(
    world: World, shared_dir: Path, servers: int, consistency: str
) -> None:
    _, asked = sizes(world, workers=2, servers=servers)
    data = blob_data()
    data.train._inputs[17] = float("inf")

    def check(sub: SubWorld) -> None:
        strategy = server(servers=asked, consistency=consistency)
        with pytest.raises(NonFiniteError, match=r"on rank \d, training samples .*the inputs of 17 are not finite"):
            run(shared_dir, sub, data=data, strategy=strategy, sync_batchnorm=False)

    within(world, check, workers=2, servers=servers)


@pytest.mark.parametrize(
    ("strategy", "fit", "told"),
    [
        ({"consistency": "async"}, {}, "fit.sync_batchnorm=true makes them wait"),
        ({"consistency": "ssp"}, {"sync_batchnorm": False, "ema_decay": 0.9}, "fit.ema_decay needs the same weights"),
        ({"servers": 3}, {}, "strategy.servers=3 in a world with 0 ranks that only serve"),
    ],
    ids=["batch norm", "ema", "servers"],
)
def test_what_cannot_work_is_refused(
    world: World, shared_dir: Path, strategy: dict[str, Any], fit: dict[str, Any], told: str
) -> None:
    def check(sub: SubWorld) -> None:
        with pytest.raises(ConfigError, match=told):
            run(shared_dir, sub, strategy=server(**{"servers": "colocated", **strategy}), **fit)

    within(world, check, workers=min(2, world.size))


def test_an_optimizer_that_looks_at_whole_tensors_is_refused_by_all(world: World, shared_dir: Path) -> None:
    def check(sub: SubWorld) -> None:
        with pytest.raises(ConfigError, match="looks at a parameter as a whole"):
            run(shared_dir, sub, strategy=server(servers="colocated"), optimizer={"_target_": "torch.optim.Adafactor"})

    within(world, check, workers=min(2, world.size))
