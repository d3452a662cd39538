"""The parameter server makes the updates that all-reduce makes, and where it does not, no read is staler than promised."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.base import Setting, StepTime, Updater
from horovod_jobs.strategy.parameter_server import ParameterServer
from tests.parallel.subworld import SubWorld, within

ARRANGEMENTS = {"1 worker, 1 server": (1, 1), "2 workers colocated": (2, 0), "2 workers, 1 server": (2, 1),
                "2 workers, 2 servers": (2, 2), "3 workers, 1 server": (3, 1)}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


class Net(nn.Module):
    """Tensors of many sizes: one that is cut into chunks, small ones that share one, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 90)
        self.norm = nn.LayerNorm(90)
        self.second = nn.Linear(90, 40)
        self.last = nn.Linear(40, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(self.norm(torch.tanh(self.first(x))))))
        return out


def arrangement(request_world: World, name: str) -> tuple[int, int, int | str]:
    workers, servers = ARRANGEMENTS[name]
    if request_world.size < workers + servers:
        pytest.skip(f"wants {workers + servers} ranks, and there are {request_world.size}")
    return workers, servers, servers or "colocated"


def train(world: World, strategy: Any, *, optimizer: str, steps: int = 6, accumulate: int = 1, clip_norm: float | None = None,
          gates: bool = True) -> tuple[list[dict[str, Tensor]], Updater]:  # fmt: skip
    """Steps as the loop makes them; the parameters after each, and the updater."""
    torch.manual_seed(0)
    model = Net()
    chosen = OPTIMIZERS[optimizer](model.parameters())
    setting = Setting(world, accumulate=accumulate, total_steps=steps, steps_per_epoch=steps, clip_norm=clip_norm,
                      model=model if gates else None)  # fmt: skip
    updater = strategy.bind(chosen, model.named_parameters(), setting)
    seen = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator)
        chosen.param_groups[0]["lr"] *= 0.9
        updater.zero_grad()
        mine = torch.arange(12)[12 * world.rank // world.size : 12 * (world.rank + 1) // world.size]
        for part in mine.chunk(accumulate):
            loss = nn.functional.cross_entropy(model(inputs[part]), targets[part], reduction="sum")
            (loss / 12).backward()
        if isinstance(world, SingleWorld) and model.unused.grad is None:
            model.unused.grad = torch.zeros(5)  # As Horovod does.
        agreed = updater.agree(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, float(len(mine))], dtype=torch.float64))
        updater.synchronize()
        assert agreed.wait()[5] == (12 if updater.lockstep else len(mine))
        updater.step()
        updater.finish_step(StepTime(0.1, 0.1, len(mine)))
        updater.settle()
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
    state = updater.optimizer_state()
    updater.close()
    seen.append({f"{number}.{key}": value for number, entry in state["state"].items() for key, value in entry.items()})
    return seen, updater


def close(ours: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for step, (got, want) in enumerate(zip(ours, wanted, strict=True)):
        for key, value in want.items():
            assert torch.allclose(got[key], value, rtol=1e-4, atol=1e-6), (step, key)


@pytest.mark.parametrize(
    "setting", [{}, {"clip_norm": 0.05}, {"accumulate": 2}, {"accumulate": 2, "clip_norm": 0.05}], ids=str
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_sync_is_all_reduce_step_by_step(world: World, name: str, optimizer: str, setting: dict[str, Any]) -> None:
    """Parameters after every step and the optimizer's state at the end are those of one process with the whole batch."""
    workers, servers, asked = arrangement(world, name)
    wanted, _ = train(SingleWorld(), Allreduce(tune=False), optimizer=optimizer, **setting)

    def compare(sub: SubWorld) -> None:
        strategy = ParameterServer(servers=asked, chunk_kb=4)
        ours, updater = train(sub, strategy, optimizer=optimizer, **setting)
        close(ours if sub.is_main else ours[:-1], wanted if sub.is_main else wanted[:-1])
        told = updater.describe()
        assert told["chunks"] > 4
        assert set(told["read_staleness_steps"]) <= {"0"}
        if sub.is_main:
            assert told["bytes_pushed"] == told["bytes_pulled"] == 6 * sub.size * sum(told["bytes_by_server"])

    within(world, compare, workers=workers, servers=servers)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_averaged_weights_are_all_reduce_for_momentum(world: World, name: str) -> None:
    """Steps of SGD are linear in the gradient, so the mean of the workers' steps is the step of their mean."""
    workers, servers, asked = arrangement(world, name)
    wanted, _ = train(SingleWorld(), Allreduce(tune=False), optimizer="momentum")

    def compare(sub: SubWorld) -> None:
        ours, _ = train(sub, ParameterServer(servers=asked, averaging="weights", chunk_kb=4), optimizer="momentum")
        close(ours[:-1], wanted[:-1])

    within(world, compare, workers=workers, servers=servers)


class Counters(nn.Module):
    """Worker w's gradient is -1 for parameter w: with a rate of 1 that parameter counts its updates."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.counts = nn.ParameterList(nn.Parameter(torch.zeros(1500)) for _ in range(workers))

    def forward(self, worker: int) -> Tensor:
        return sum(
            (values.sum() * (-1.0 if index == worker else 0.0) for index, values in enumerate(self.counts)),
            torch.zeros(()),
        )


def staleness_seen(
    sub: SubWorld, strategy: ParameterServer, *, steps: int, slow_s: float
) -> tuple[int, dict[str, Any]]:
    """What the forward passes of all workers really missed at most: in steps of the slowest, which sleeps."""
    model = Counters(sub.size)
    setting = Setting(sub, total_steps=steps, steps_per_epoch=steps, model=model)
    updater = strategy.bind(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), setting)
    worst = 0
    for step in range(steps):
        if sub.rank == sub.size - 1:
            time.sleep(slow_s)
        updater.zero_grad()
        loss = model(sub.rank)
        seen = [values.detach() for values in model.counts]
        assert float(seen[sub.rank].min()) == step, "a worker reads its own updates"
        worst = max(worst, *(step - int(values.min()) for values in seen))
        loss.backward()
        agreed = updater.agree(torch.zeros(5, dtype=torch.float64))
        updater.synchronize()
        agreed.wait()
        updater.step()
    updater.settle()
    assert [values.unique().tolist() for values in model.counts] == [[float(steps)]] * sub.size, (
        "every update counts once"
    )
    updater.close()
    reports = sub.gather_json([worst, updater.describe()], name="test.worst")
    return max(report[0] for report in reports), reports[0][1]


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("name", list(ARRANGEMENTS)[1:])
def test_no_read_is_staler_than_the_bound_with_a_slow_worker(world: World, name: str, bound: int) -> None:
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        strategy = ParameterServer(servers=asked, consistency="ssp", staleness=bound, chunk_kb=4)
        worst, told = staleness_seen(sub, strategy, steps=10, slow_s=0.03)
        assert worst <= bound
        assert max(map(int, told["read_staleness_steps"])) == bound, "fast workers go as far as they may"
        assert sum(told["read_staleness_steps"].values()) == 10 * sub.size * told["chunks"]

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize("name", list(ARRANGEMENTS)[1:])
def test_without_a_bound_the_same_worker_is_left_behind(world: World, name: str) -> None:
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        worst, told = staleness_seen(sub, ParameterServer(servers=asked, consistency="async"), steps=10, slow_s=0.05)
        assert worst > 3
        assert max(map(int, told["read_staleness_steps"])) >= worst

    within(world, check, workers=workers, servers=servers)


class Clicks(nn.Module):
    """An embedding whose rows are mostly left alone, and a small dense part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(3001, 4, mode="sum", sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids))
        return out


ROW_RULES: dict[str, tuple[Any, Any]] = {
    "SGD": (torch.optim.SGD, torch.optim.SGD),
    "Adagrad": (torch.optim.Adagrad, torch.optim.Adagrad),
    "Adam": (torch.optim.Adam, torch.optim.SparseAdam),
}


def click_steps(
    world: World, updater: Any, model: Clicks, *, steps: int, step: Callable[[], None] | None = None
) -> list[dict[str, Tensor]]:
    """Three ids a sample out of a few hundred; the parameters after each step."""
    seen = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        ids, targets = torch.randint(300, (8, 3), generator=generator) * 10, torch.randint(2, (8,), generator=generator)
        mine = slice(8 * world.rank // world.size, 8 * (world.rank + 1) // world.size)
        updater.zero_grad()
        (nn.functional.cross_entropy(model(ids[mine]), targets[mine], reduction="sum") / 8).backward()
        if step is not None:
            step()
        else:
            agreed = updater.agree(torch.zeros(5, dtype=torch.float64))
            updater.synchronize()
            agreed.wait()
            updater.step()
            updater.settle()
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
    return seen


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("rule", ROW_RULES)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_touched_rows_are_updated_as_torch_updates_them(
    world: World, name: str, rule: str, clip_norm: float | None
) -> None:
    workers, servers, asked = arrangement(world, name)
    dense_rule, row_rule = ROW_RULES[rule]

    def plain() -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        model = Clicks()
        both = [dense_rule(model.head.parameters(), lr=0.05), row_rule(model.table.parameters(), lr=0.05)]

        class Both:
            def zero_grad(self) -> None:
                for optimizer in both:
                    optimizer.zero_grad()

        def step() -> None:
            grad = model.table.weight.grad
            assert grad is not None
            model.table.weight.grad = grad = grad.coalesce()
            parts = [grad.values(), *(parameter.grad for parameter in model.head.parameters())]
            norm = sum(float(part.square().sum()) for part in parts) ** 0.5
            for part in parts if clip_norm is not None else ():
                part.mul_(min(1.0, clip_norm / (norm + 1e-6)))
            for optimizer in both:
                optimizer.step()

        with torch.sparse.check_sparse_tensor_invariants(True):
            return click_steps(SingleWorld(), Both(), model, steps=5, step=step)

    def check(sub: SubWorld) -> None:
        wanted = plain()
        torch.manual_seed(0)
        model = Clicks()
        before = model.table.weight.detach().clone()
        optimizer = dense_rule(model.parameters(), lr=0.05)
        setting = Setting(sub, total_steps=5, steps_per_epoch=5, clip_norm=clip_norm, model=model)
        updater = ParameterServer(servers=asked, chunk_kb=1).bind(optimizer, model.named_parameters(), setting)
        close(click_steps(sub, updater, model, steps=5), wanted)
        state = updater.optimizer_state()["state"]
        if sub.is_main and rule != "SGD":
            first = state[0]["sum" if rule == "Adagrad" else "exp_avg"]
            assert first.shape == (3001, 4)
            rows = (wanted[-1]["table.weight"] != before).any(dim=1)
            assert torch.equal((first != 0).any(dim=1), rows), "the state of touched rows only"
        updater.close()
        told = updater.describe()
        if sub.is_main:
            assert told["embedding_rows"] == [3001]
            assert 0 < told["embedding_bytes_moved"] < told["embedding_bytes_of_whole_tables"] / 20

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize("name", list(ARRANGEMENTS)[1:])
def test_rows_of_workers_out_of_step_end_the_same_everywhere(world: World, name: str) -> None:
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        torch.manual_seed(0)
        model = Clicks()
        setting = Setting(sub, total_steps=8, steps_per_epoch=8, model=model, clip_norm=1.0)
        strategy = ParameterServer(servers=asked, consistency="ssp", staleness=1)
        updater = strategy.bind(torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), setting)
        before = model.table.weight.detach().clone()
        click_steps(sub, updater, model, steps=8)
        updater.close()
        changed = (model.table.weight.detach() != before).any(dim=1).nonzero().flatten()
        assert set((changed % 10).tolist()) == {0}, "only rows that the samples have"
        same = sub.gather_json(model.table.weight.detach().double().sum().item(), name="test.same")
        assert len(set(same)) == 1

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            "optimizer.momentum=0.9 changes every row",
        ),
        (lambda parameters: torch.optim.RMSprop(parameters, lr=0.1), "RMSprop takes no sparse gradients"),
    ],
    ids=["momentum", "RMSprop"],
)
def test_rules_that_change_rows_nobody_touched_are_refused(world: World, optimizer: Any, told: str) -> None:
    def check(sub: SubWorld) -> None:
        model = Clicks()
        with pytest.raises(ConfigError, match=told):
            ParameterServer(servers="colocated").bind(
                optimizer(model.parameters()), model.named_parameters(), Setting(sub, model=model)
            )

    within(world, check, workers=min(2, world.size))
