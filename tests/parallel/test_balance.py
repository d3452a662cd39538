"""Uneven shares under real ranks: the same training to rounding, shares that follow a slow rank, and a resumed run that keeps them."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.data.augment import ShiftFlipCrop
from horovod_jobs.errors import Interrupted
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.balance import Even, excess, grained
from horovod_jobs.strategy.base import StepTime
from tests.support import ALLREDUCE, SmallNet, blob_data, context, fit_config, train_stage

BALANCED = {**ALLREDUCE, "balance": "throughput", "balance_every": 5}


class Script(Even):
    """Shares that were written before: others after every second step, some ranks with nothing among them."""

    every = 2

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self._plan = [torch.rand(size, generator=generator).pow(2) for _ in range(20)]
        self._plan[1] = torch.zeros(size)
        self._plan[1][0] = 1.0
        self._plan[2] = torch.zeros(size)
        self._plan[2][-1] = 1.0
        self.samples: list[int] = []

    @property
    def shares(self) -> tuple[float, ...]:
        return grained((self._plan[0] / self._plan[0].sum()).tolist())

    def note(self, spent: StepTime) -> None:
        self.samples.append(spent.samples)

    def reshare(self) -> None:
        self._plan.append(self._plan.pop(0))


class Forced(Allreduce):
    """All-reduce with shares by a script."""

    def bind(self, optimizer: Any, named_parameters: Any, setting: Any) -> Any:
        made = super().bind(optimizer, named_parameters, setting)
        made._balancer = Script(setting.world.size)
        made.reshare_every = made._balancer.every
        _seen.append(made._balancer)
        return made


_seen: list[Script] = []


class Steady(Allreduce):
    """All-reduce whose balancer is told of ranks that differ by noise alone, whatever the machine does."""

    def bind(self, optimizer: Any, named_parameters: Any, setting: Any) -> Any:
        made = super().bind(optimizer, named_parameters, setting)
        noise = torch.Generator().manual_seed(setting.world.rank)
        note = made._balancer.note

        def told(spent: StepTime) -> None:
            pace = 0.001 * (1 + 0.06 * float(torch.rand(1, generator=noise)))
            note(replace(spent, compute_s=pace * spent.samples))

        made._balancer.note = told
        return made


class Paced(SmallNet):
    """Takes so many milliseconds a sample on each rank, asleep, so that nothing else on the machine changes the ratio."""

    ms_a_sample: tuple[float, ...] = (0.0,)
    rank = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(len(x) * self.ms_a_sample[self.rank % len(self.ms_a_sample)] / 1000)
        return super().forward(x)


PACED = {"_target_": f"{__name__}.Paced"}


class StopAt(StopRequest):
    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def code(self) -> int:
        self._left -= 1
        return 1 if self._left <= 0 else 0


def run(
    directory: Path, world: World, *, samples: int = 103, stop: StopRequest | None = None, model: Any = None,
    strategy: dict[str, Any] = ALLREDUCE, **fit: Any
) -> tuple[dict[str, Tensor], StageResult]:  # fmt: skip
    ctx = context(directory, world=world, data=blob_data(samples, augment=ShiftFlipCrop(shift=1, flip=True)), stop=stop)
    stage = train_stage(fit=fit_config(**fit), strategy=strategy, **({} if model is None else {"model": model}))
    result = train.run(ctx, stage)
    return load_file(ctx.staging / "model.safetensors"), result


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, value in wanted.items():
        assert torch.allclose(ours[key].double(), value.double(), rtol=1e-3, atol=2e-4), key


@pytest.mark.parametrize(
    "settings",
    [{}, {"samples": 97}, {"clip_norm": 0.1}, {"ema_decay": 0.9}, {"drop_last": True}, {"max_steps": 7}, {"epochs": 5}],
    ids=str,
)
def test_any_shares_give_the_loss_curve_of_one_process(
    world: World, shared_dir: Path, settings: dict[str, Any]
) -> None:
    """Synchronised batch norm included. 97 samples leave a last batch of one; some shares leave a rank without any."""
    _seen.clear()
    uneven, result = run(shared_dir / "uneven", world, strategy={"_target_": f"{__name__}.Forced"}, **settings)
    even, _ = run(shared_dir / "even", world, **settings)
    wanted, alone = run(shared_dir / f"alone-{world.rank}", SingleWorld(), **settings)
    assert_close(uneven, even)
    assert_close(uneven, wanted)
    for got, want in zip(result.details["history"], alone.details["history"], strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
        assert got["validation_loss"] == pytest.approx(want["validation_loss"], rel=1e-3)
    everyone = world.gather_json(_seen[0].samples, name="test.samples")
    per_step = [sum(parts) for parts in zip(*everyone, strict=True)]
    assert set(per_step) <= {24, 103 % 24, 97 % 24}, "each step had its whole batch"
    assert any(0 in parts for parts in zip(*everyone, strict=True)) or len(per_step) < 8
    assert len({tuple(parts) for parts in zip(*everyone, strict=True)}) > 2, "shares really were uneven and changed"


def test_accumulation_is_exact_without_batch_norm(world: World, shared_dir: Path) -> None:
    linear = {"_target_": f"{__name__}.Flat"}
    forced = {"_target_": f"{__name__}.Forced"}
    uneven, _ = run(shared_dir / "uneven", world, model=linear, strategy=forced, accumulate=3)
    wanted, _ = run(shared_dir / f"alone-{world.rank}", SingleWorld(), model=linear, accumulate=3)
    assert all(torch.allclose(uneven[key], wanted[key], atol=1e-6) for key in wanted)


class Flat(torch.nn.Module):
    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


def paced(monkeypatch: pytest.MonkeyPatch, world: World, ms_a_sample: tuple[float, ...]) -> None:
    monkeypatch.setattr(Paced, "rank", world.rank)
    monkeypatch.setattr(Paced, "ms_a_sample", ms_a_sample)


@pytest.mark.world_size(2)
def test_shares_follow_a_slow_rank_and_change_nothing_else(
    world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With synchronised batch norm, where the fast rank waits for the slow one inside its forward and backward passes."""
    paced(monkeypatch, world, (2.0, 4.0))
    balanced, result = run(shared_dir / "a", world, model=PACED, strategy=BALANCED, epochs=14)
    paced(monkeypatch, world, (0.0,))
    even, straight = run(shared_dir / "b", world, model=PACED, epochs=14)
    told = result.details["exchange"]["balance"]
    assert told["shares"] == pytest.approx([2 / 3, 1 / 3], abs=0.12)
    assert told["history"][0]["shares"] != [0.5, 0.5], "the first look is enough to begin"
    times = zip(*(entry["ms_a_sample"] for entry in told["history"][-5:]), strict=True)
    speeds = [1 / statistics.median(ms) for ms in times]
    assert excess(told["shares"], speeds) < 0.2 < excess([0.5, 0.5], speeds), "both are ready at about the same time"
    assert told["history"][-1]["step"] == 70
    for got, want in zip(result.details["history"], straight.details["history"], strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-3)
    for key, value in even.items():
        assert torch.allclose(balanced[key].double(), value.double(), rtol=5e-3, atol=2e-3), key
    everyone = world.gather_json(told["history"], name="test.history")
    assert all(other == everyone[0] for other in everyone), "all ranks decided alike"


@pytest.mark.world_size(2)
def test_equal_ranks_stay_even_to_the_last_bit(world: World, shared_dir: Path) -> None:
    steady = {**BALANCED, "_target_": f"{__name__}.Steady"}
    balanced, result = run(shared_dir / "a", world, strategy=steady, epochs=6)
    even, _ = run(shared_dir / "b", world, epochs=6)
    told = result.details["exchange"]["balance"]
    assert len(told["history"]) == 6
    assert told["shares"] == [], f"no rank was slower: {told['history']}"
    assert all(torch.equal(balanced[key], even[key]) for key in even)


@pytest.mark.world_size(2)
def test_a_resumed_run_begins_with_the_shares_it_had(
    world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(monkeypatch, world, (2.0, 4.0))
    with pytest.raises(Interrupted, match="after step 12 of 20"):
        run(shared_dir, world, model=PACED, strategy=BALANCED, epochs=4, stop=StopAt(12))
    resumed, result = run(shared_dir, world, model=PACED, strategy=BALANCED, epochs=4)
    paced(monkeypatch, world, (0.0,))
    even, _ = run(shared_dir / "even", world, model=PACED, epochs=4)
    history = result.details["exchange"]["balance"]["history"]
    assert result.resumed_from_step == 12
    assert [entry["step"] for entry in history] == [5, 10, 20], "steps 13 to 15 are too few, and wait for the next look"
    assert history[1]["shares"][0] > 0.55
    assert history[2]["shares"][0] >= history[1]["shares"][0] - 0.05, "it did not start evenly again"
    for key, value in even.items():
        assert torch.allclose(resumed[key].double(), value.double(), rtol=2e-3, atol=5e-4), key
