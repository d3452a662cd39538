"""Local SGD in a world of one, and what it refuses. What ranks do together is in tests/parallel/test_local_sgd.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from horovod_jobs.comm.world import GradientExchange, SingleWorld
from horovod_jobs.errors import ConfigError, NonFiniteError
from horovod_jobs.stages import train
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.local_sgd import LocalSgd, LocalSgdUpdater
from tests.support import ALLREDUCE, blob_data, context, fit_config, train_stage

LOCAL = {"_target_": "horovod_jobs.strategy.local_sgd.LocalSgd"}


class Two(SingleWorld):
    """Rank 0 of two; the other has the same, so a sum is twice and an average once what it is given."""

    size = 2

    def __init__(self) -> None:
        self.names: list[str] = []

    def allreduce_async(self, tensor: Any, *, name: str, op: str = "sum") -> Any:
        self.names.append(name)
        return super().allreduce_async(tensor * 2 if op == "sum" else tensor, name=name, op=op)

    def distribute(self, *args: Any, **settings: Any) -> GradientExchange:
        """One that says what it sends: the gradient of ``updater``'s only parameter."""
        made = super().distribute(*args, **settings)
        synchronize = made.synchronize

        def counted() -> None:
            synchronize()
            made.traffic.count_allreduce(3 * 4, ranks=2)

        made.synchronize = counted  # type: ignore[method-assign]
        return made


def updater(world: SingleWorld, *, total: int = 20, epoch: int = 7, **settings: Any) -> LocalSgdUpdater:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    setting = Setting(world, total_steps=total, steps_per_epoch=epoch)
    return LocalSgd(**settings).bind(optimizer, [("p", parameter)], setting)


def make_step(made: LocalSgdUpdater, *, flag: float = 1.0) -> list[float]:
    """What was agreed in one step, in which this rank put a flag up."""
    made.zero_grad()
    parameter = made.param_groups[0]["params"][0]
    parameter.grad = torch.ones(3)
    agreed = made.agree(torch.tensor([0.0, flag, 0.0, 0.0, 5.0, 3.0], dtype=torch.float64))
    made.synchronize()
    made.step()
    found: list[float] = agreed.wait().tolist()
    return found


@pytest.mark.parametrize(
    ("settings", "boundaries"),
    [
        ({"period": 3}, [3, 6, 7, 10, 13, 14, 17, 20]),
        ({"period": 1}, list(range(1, 21))),
        ({"period": 100}, [7, 14, 20]),
        ({"period": 3, "start_step": 2}, [1, 2, 5, 7, 10, 13, 14, 17, 20]),
        ({"period": 4, "start_fraction": 0.5}, [*range(1, 11), 14, 18, 20]),
        ({"period": 4, "start_fraction": 1.0}, list(range(1, 21))),
    ],
    ids=str,
)
def test_flags_and_parameters_meet_at_the_end_of_a_period_of_an_epoch_and_of_the_run(
    settings: dict[str, Any], boundaries: list[int]
) -> None:
    world = Two()
    made = updater(world, **settings)
    settled = []
    for step in range(1, 21):
        before = len(world.names)
        found = make_step(made)
        assert found[4:] == [5.0, 3.0], "the sums stay this rank's own"
        assert found[1] == (2.0 if step in boundaries else 0.0), "a flag is seen by all at once, or by nobody"
        if step not in boundaries:
            assert world.names[before:] == [], "nothing is exchanged"
        if made.settled:
            settled.append(step)
    assert settled == boundaries
    assert world.names.count("fit.control") == len(boundaries)


def test_a_local_step_is_that_of_the_mean_over_the_ranks_own_samples() -> None:
    """The loop divides by the global batch: with two ranks, half of what is this rank's own mean."""
    made = updater(Two(), period=5)
    make_step(made)
    assert torch.allclose(made.param_groups[0]["params"][0].detach(), torch.full((3,), 1 - 0.1 * 2.0))


def test_settle_averages_once() -> None:
    world = Two()
    made = updater(world, period=5)
    make_step(made)
    assert not made.settled
    made.settle()
    made.settle()
    assert made.settled
    assert world.names == ["strategy.local_sgd.torch.float32"]


@pytest.mark.parametrize(("average_state", "tensors"), [(False, 1), (True, 2)])
def test_bytes_are_those_of_what_is_sent(average_state: bool, tensors: int) -> None:
    made = updater(Two(), period=5, start_step=2, average_state=average_state)
    for _ in range(7):
        make_step(made)
    told = made.describe()
    assert (told["allreduce_steps"], told["averagings"]) == (2, 1)
    assert told["bytes_sent"] == 3 * 4 * 2 + 3 * 4 * tensors
    assert told["bytes_uncompressed"] == 3 * 4 * 7


def test_a_checkpoint_goes_on_in_the_same_place() -> None:
    first, second = updater(Two(), period=5, start_step=3), updater(Two(), period=5, start_step=3)
    for _ in range(7):
        make_step(first)
    second.restore(first.state())
    assert second.describe() == first.describe()
    assert [(make_step(second), second.settled) for _ in range(8)] == [
        (make_step(first), first.settled) for _ in range(8)
    ]


def test_alone_it_is_the_optimizer_itself(tmp_path: Path) -> None:
    weights = []
    for name, strategy in (("local", {**LOCAL, "period": 3, "start_step": 2}), ("allreduce", ALLREDUCE)):
        ctx = context(tmp_path / name)
        result = train.run(ctx, train_stage(strategy=strategy, fit=fit_config(clip_norm=0.5)))
        weights.append(load_file(ctx.staging / "model.safetensors"))
        assert len(result.details["history"]) == 2
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_a_loss_that_is_not_finite_in_the_middle_of_a_period_publishes_nothing(tmp_path: Path) -> None:
    data = blob_data()
    data.train._inputs[17] = float("nan")
    ctx = context(tmp_path, data=data)
    with pytest.raises(NonFiniteError, match="the inputs of 17 are not finite"):
        train.run(ctx, train_stage(strategy={**LOCAL, "period": 100}))
    assert not list(ctx.staging.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, "strategy.period=0 is not a number of steps; use 1 or more"),
        ({"start_step": -1}, "strategy.start_step=-1 is negative; use 0 or more"),
        ({"start_fraction": 1.5}, "strategy.start_fraction=1.5 is not a part of the run; use 0.5, say, or null"),
        (
            {"start_fraction": 0.5, "start_step": 3},
            "start_fraction=0.5 and strategy.start_step=3 say the same; set one",
        ),
    ],
)
def test_values_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalSgd(**settings)


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ("synced_batchnorm", "set fit.sync_batchnorm=false"),
        ("averages_weights", "set fit.ema_decay=null"),
        ("loss_scaled", "use fit.precision=bf16 or fp32"),
    ],
)
def test_stages_whose_steps_all_ranks_must_make_together_are_refused(need: str, message: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(ConfigError, match=message):
        LocalSgd().bind(optimizer, [("p", parameter)], Setting(SingleWorld(), **{need: True}))
