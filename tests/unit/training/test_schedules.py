"""Schedules against their formulas and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horovod_jobs.errors import ConfigError
from horovod_jobs.training.schedules import Constant, Cosine, OneCycle, Schedule, Step


def rates(schedule: Schedule, total: int, steps_per_epoch: int = 10) -> list[float]:
    return [schedule.factor(step, total=total, steps_per_epoch=steps_per_epoch) for step in range(total)]


def torch_rates(make, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    got = []
    for _ in range(total):
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return got


def test_one_cycle_is_torchs() -> None:
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=1.0, total_steps=100, pct_start=0.31, div_factor=25, final_div_factor=1e4 / 25, cycle_momentum=False), 100)  # fmt: skip
    # torch puts the peak one step earlier: at pct_start * total - 1.
    ours = rates(OneCycle(peak_at=30 / 99, start=0.04, final=0.0001), 100)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_cosine_is_torchs() -> None:
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.1), 50)
    assert rates(Cosine(final=0.1), 50) == pytest.approx(theirs, abs=1e-9)


def test_step_is_torchs() -> None:
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[20, 40], gamma=0.1), 60)
    assert rates(Step(milestones=[2, 4], gamma=0.1), 60) == pytest.approx(theirs)


def test_warm_up_is_linear_from_its_start() -> None:
    got = rates(Constant(warmup_epochs=1.0, warmup_start=0.25), 20, steps_per_epoch=10)
    assert got[:10] == pytest.approx([0.25 + 0.75 * step / 10 for step in range(10)])
    assert got[10:] == [1.0] * 10


@given(total=st.integers(1, 300), peak_at=st.floats(0.01, 0.99), warmup=st.floats(0, 3))
def test_rates_stay_between_zero_and_one(total: int, peak_at: float, warmup: float) -> None:
    for schedule in (
        OneCycle(peak_at=peak_at),
        Cosine(warmup_epochs=warmup),
        Step(milestones=[1], warmup_epochs=warmup),
    ):
        assert all(0.0 <= rate <= 1.0 + 1e-12 and math.isfinite(rate) for rate in rates(schedule, total))


@pytest.mark.parametrize(
    ("cls", "arguments"), [(OneCycle, {"peak_at": 1.0}), (Cosine, {"warmup_epochs": -1}), (Step, {"warmup_start": 2})]
)
def test_bad_values_are_refused(cls: type, arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(arguments))}="):
        cls(**arguments)
