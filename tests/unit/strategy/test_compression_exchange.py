"""The exchange around the methods, in a world of one: hooks, momentum, clipping, what a checkpoint keeps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import SingleWorld, Traffic
from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.strategy.adasum import check_world
from horovod_jobs.strategy.allreduce import PROBE_STEPS, Allreduce, AllreduceUpdater
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.compression.bf16 import Bf16
from horovod_jobs.strategy.compression.onebit import OneBit
from horovod_jobs.strategy.compression.powersgd import PowerSgd
from horovod_jobs.strategy.compression.topk import TopK

METHODS: dict[str, Callable[[], Any]] = {
    "topk": lambda: TopK(ratio=0.1, min_elements=1),
    "onebit": lambda: OneBit(bucket=16, min_elements=1),
    "powersgd": lambda: PowerSgd(rank=1, min_elements=1),
}


class Claims(SingleWorld):
    """A world that says it is of this size; nothing is sent in it."""

    def __init__(self, size: int, controller: str) -> None:
        self.size, self.controller = size, controller


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


def sgd(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **changes})


def bind(model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Allreduce, **setting: Any) -> AllreduceUpdater:
    return strategy.bind(optimizer, model.named_parameters(), Setting(SingleWorld(), **setting))


def train(model: nn.Module, updater: Any, steps: range, *, accumulate: int = 1) -> dict[str, Tensor]:
    for step in steps:
        updater.zero_grad()
        for part in range(accumulate):
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step * accumulate + part))
            (model(inputs).square().mean() / accumulate).backward()
        updater.synchronize()
        updater.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"nesterov": True, "weight_decay": 0.1}, {"momentum": 0.0},
     {"maximize": True, "weight_decay": 0.01}],
    ids=str,
)  # fmt: skip
def test_all_elements_train_as_the_optimizer_alone(optimizer: dict[str, Any]) -> None:
    """Momentum moves from the optimizer to the method, and weight decay keeps its own: together they are what they were."""
    plain, ours = net(), net()
    wanted = train(plain, bind(plain, sgd(plain, **optimizer), Allreduce()), range(8))
    method = TopK(ratio=1.0, momentum_masking=False, min_elements=1)
    made = sgd(ours, **optimizer)
    updater = bind(ours, made, Allreduce(compression=method))
    assert close(train(ours, updater, range(8)), wanted)
    assert updater.describe()["method"]["momentum_taken_over"] is (optimizer.get("momentum", 0.9) > 0)
    assert made.param_groups[0]["momentum"] == optimizer.get("momentum", 0.9), "the optimizer is left as it was"


def test_another_optimizer_keeps_its_own_state() -> None:
    plain, ours = net(), net()
    wanted = train(plain, bind(plain, torch.optim.AdamW(plain.parameters(), lr=0.01), Allreduce()), range(5))
    updater = bind(ours, torch.optim.AdamW(ours.parameters(), lr=0.01), Allreduce(compression=TopK(ratio=1.0)))
    assert close(train(ours, updater, range(5)), wanted)
    assert updater.describe()["method"]["momentum_taken_over"] is False


def test_backward_passes_add_up_to_one_exchange() -> None:
    plain, ours = net(), net()
    wanted = train(plain, bind(plain, sgd(plain), Allreduce(), accumulate=3), range(4), accumulate=3)
    method = TopK(ratio=1.0, momentum_masking=False, min_elements=1)
    updater = bind(ours, sgd(ours), Allreduce(compression=method), accumulate=3)
    assert close(train(ours, updater, range(4), accumulate=3), wanted)
    assert updater.state()["traffic"]["steps"] == 4


def test_one_backward_pass_too_many_is_an_error() -> None:
    model = net()
    updater = bind(model, sgd(model), Allreduce(compression="bf16"))
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(JobError, match="2 backward passes in a step of 1"):
        model(torch.ones(1, 6)).sum().backward()
    updater.close()


def test_a_layer_that_is_not_used_has_a_gradient_of_zeros() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    updater = bind(model, sgd(model), Allreduce(compression=Bf16(min_elements=1)))
    updater.zero_grad()
    model["used"](torch.ones(1, 4)).sum().backward()
    updater.synchronize()
    assert [int(parameter.grad.count_nonzero()) for parameter in model["idle"].parameters()] == [0, 0]  # type: ignore[union-attr]
    assert int(model["used"].weight.grad.count_nonzero()) == 16  # type: ignore[union-attr]


def test_channels_last_gradients_come_back_in_their_places() -> None:
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    updater = bind(model, sgd(model, momentum=0.0), Allreduce(compression=TopK(ratio=1.0, min_elements=1)))
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    twin = nn.Conv2d(3, 8, 3)
    twin.load_state_dict(model.state_dict())
    model(inputs.to(memory_format=torch.channels_last)).square().sum().backward()
    twin(inputs).square().sum().backward()
    updater.synchronize()
    assert torch.allclose(model.weight.grad, twin.weight.grad, atol=1e-4)


def test_the_local_gradient_is_clipped_before_it_is_kept_and_the_sum_is_not() -> None:
    model = net()
    method = TopK(ratio=0.1, momentum_correction=False, warmup_epochs=0, min_elements=1)
    updater = bind(model, sgd(model), Allreduce(compression=method), clip_norm=0.01)
    updater.zero_grad()
    model(100 * torch.ones(4, 6)).square().sum().backward()
    before = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])  # type: ignore[union-attr]
    updater.synchronize()
    after = {name: parameter.grad.reshape(-1) for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    for name, residual in updater.rank_state().items():
        after[name.removesuffix(".residual")] = after[name.removesuffix(".residual")] + residual
    assert float(before.norm()) > 1
    assert float(torch.cat(list(after.values())).norm()) == pytest.approx(0.01, rel=1e-3)
    weights = model.state_dict()["0.weight"].clone()
    sent = dict(model.named_parameters())["0.weight"].grad.clone()  # type: ignore[union-attr]
    updater.step()
    assert torch.allclose(model.state_dict()["0.weight"], weights - 0.1 * sent, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_going_on_from_what_was_kept_is_exact(name: str) -> None:
    whole, first, second = net(), net(), net()
    wanted = train(whole, bind(whole, sgd(whole), Allreduce(compression=METHODS[name]())), range(10))
    early, optimizer = bind(first, (made := sgd(first)), Allreduce(compression=METHODS[name]())), made
    train(first, early, range(4))
    second.load_state_dict(first.state_dict())
    again = sgd(second)
    again.load_state_dict(optimizer.state_dict())
    late = bind(second, again, Allreduce(compression=METHODS[name]()))
    late.restore(early.state())
    late.restore_rank([early.rank_state()])
    got = train(second, late, range(4, 10))
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert late.describe()["method"] == early.describe()["method"]


def test_without_what_was_kept_it_is_not() -> None:
    """Otherwise the test above would say nothing."""
    whole, first = net(), net()
    wanted = train(whole, bind(whole, sgd(whole), Allreduce(compression=METHODS["topk"]())), range(10))
    optimizer = sgd(first)
    early = bind(first, optimizer, Allreduce(compression=METHODS["topk"]()))
    train(first, early, range(4))
    early.close()
    late = bind(first, optimizer, Allreduce(compression=METHODS["topk"]()))
    got = train(first, late, range(4, 10))
    assert not all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_what_ranks_that_are_gone_kept_is_added_up() -> None:
    model = net()
    updater = bind(model, sgd(model), Allreduce(compression=METHODS["topk"]()))
    shapes = {name: tensor.shape for name, tensor in updater.rank_state().items()}
    states = [{name: torch.full(shape, float(rank + 1)) for name, shape in shapes.items()} for rank in range(3)]
    updater.restore_rank(states)
    assert shapes.keys() == {"0.weight.residual", "0.weight.momentum", "2.weight.residual", "2.weight.momentum"}
    assert all(torch.equal(tensor, torch.full(tensor.shape, 6.0)) for tensor in updater.rank_state().values())


def test_closing_takes_the_hooks_away() -> None:
    model = net()
    updater = bind(model, sgd(model), Allreduce(compression="onebit"))
    updater.close()
    for _ in range(3):
        model(torch.ones(1, 6)).sum().backward()


def test_only_horovods_own_exchange_is_tuned() -> None:
    model, world = net(), Claims(2, "mpi")
    for compression in ("bf16", "topk"):
        strategy = Allreduce(compression=compression)
        updater = strategy.bind(sgd(model), model.named_parameters(), Setting(world, total_steps=10 * PROBE_STEPS))
        assert not updater.tuning
        updater.close()
    strategy = Allreduce(compression="fp16")
    assert strategy.bind(sgd(model), model.named_parameters(), Setting(world, total_steps=10 * PROBE_STEPS)).tuning


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["topk", "randomk", "onebit", "sign", "powersgd"])
def test_a_changing_loss_scale_and_a_residual_do_not_go_together(name: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"keeps what it has not sent, and fit\.precision=fp16 changes the scale"):
        bind(model, sgd(model), Allreduce(compression=name), loss_scaled=True)
    for other in ("bf16", "qsgd"):
        bind(model, sgd(model), Allreduce(compression=other), loss_scaled=True).close()


def test_dampening_has_no_place_in_momentum_correction() -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"optimizer\.dampening=0\.1 has no place"):
        bind(model, sgd(model, dampening=0.1), Allreduce(compression="topk"))
    bind(model, sgd(model, dampening=0.1), Allreduce(compression=TopK(momentum_correction=False))).close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"compression": "bf16"},
            r"^bf16 \(strategy\.compression\) .*; use strategy\.compression=none, or sparse=false",
        ),
        ({"op": "adasum"}, r"^adasum \(strategy\.op\) takes dense gradients .*; use strategy\.op=sum, or"),
        ({"hierarchical": True}, r"^hierarchical \(strategy\.hierarchical\) .*; use strategy\.hierarchical=false, or"),
    ],
)
def test_sparse_gradients_are_refused(arguments: dict[str, Any], text: str) -> None:
    model = nn.EmbeddingBag(10, 4, sparse=True)
    updater = bind(model, torch.optim.SGD(model.parameters(), lr=0.1), Allreduce(**arguments))
    with pytest.raises(ConfigError, match=text):
        model(torch.tensor([[1, 2]])).sum().backward()
    updater.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"predivide": 0.0}, r"predivide=0\.0 is not positive"),
        ({"predivide": 2.0, "compression": "topk"}, r"predivide=2\.0 is for sums by Horovod, and topk is combined in another way"),
        ({"predivide": 2.0, "op": "adasum"}, r"predivide=2\.0 is for sums by Horovod, and adasum"),
        ({"op": "adasum", "compression": "topk"}, r"op=adasum combines whole gradients"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Allreduce(**arguments)


@pytest.mark.parametrize(
    ("size", "controller", "text"),
    [
        (3, "mpi", r"needs a power of two of ranks and there are 3; start 2 or 4"),
        (6, "mpi", r"there are 6; start 4 or 8"),
        (2, "gloo", r"needs MPI and these ranks were started under gloo; start them by MPI \(launch\.controller=mpi\)"),
    ],
)
def test_adasum_says_where_it_cannot_be(size: int, controller: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_world(Claims(size, controller))
    model = net()
    with pytest.raises(ConfigError, match=text):
        Allreduce(op="adasum").bind(sgd(model), model.named_parameters(), Setting(Claims(size, controller)))
    for fine in (1, 2, 4, 8):
        check_world(Claims(fine, "mpi"))


def test_traffic_is_summed_up() -> None:
    traffic = Traffic()
    traffic.count_allreduce(100, ranks=4)
    traffic.count_allgather(10, ranks=4)
    traffic.steps = 2
    assert (traffic.sent_bytes, traffic.ring_bytes) == (110, 150 + 30)
    told = traffic.summary(uncompressed_bytes=1000, ranks=4)
    assert told == {
        "bytes_sent": 110,
        "bytes_uncompressed": 2000,
        "compression_ratio": 18.182,
        "bytes_sent_per_step": 55,
        "bytes_sent_by_ring": 180,
        "bytes_uncompressed_by_ring": 3000,
    }
    alone = Traffic()
    alone.count_allreduce(100, ranks=1)
    assert alone.summary(uncompressed_bytes=1000, ranks=1)["compression_ratio"] is None
    alone.restore(traffic.to_json())
    assert alone == traffic
