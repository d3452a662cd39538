"""What a parameter server exchanges while layers compute, in which order, and how the time of it is counted."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from horovod_jobs.comm.channel import Wire
from horovod_jobs.comm.world import World
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.parameter_server import ParameterServer
from tests.parallel.subworld import SubWorld, within
from tests.parallel.test_parameter_server import Net, arrangement


class Slow(torch.autograd.Function):
    """A layer whose passes take long without a hook."""

    seconds = 0.5

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(Slow.seconds)
        return grads[0]


class Wide(nn.Module):
    """Its gradients are ready before a slow layer's, and its last layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.back, self.front = nn.Linear(1024, 3), nn.Linear(512, 1024), nn.Linear(4, 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.back(Slow.apply(self.front(x))))  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("name", ["2 workers colocated", "2 workers, 1 server"])
def test_pushes_leave_and_come_back_while_a_slow_layer_computes(world: World, name: str) -> None:
    """Far more than the window is away and back before the backward pass ends, though no hook runs meanwhile."""
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        torch.manual_seed(0)
        model = Wide()
        setting = Setting(sub, total_steps=2, steps_per_epoch=2, model=model)
        strategy = ParameterServer(servers=asked, chunk_kb=32, window_kb=64)
        updater: Any = strategy.bind(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), setting)
        size = model.back.weight.nbytes
        for _ in range(2):
            updater.zero_grad()
            loss = model(torch.ones(2, 4)).sum()
            sub.barrier(name="test.together")
            before = updater._courier.bytes_in
            loss.backward()
            assert updater._courier.bytes_in - before > 0.9 * size
            updater.synchronize()
            updater.step()
        updater.settle()
        updater.close()

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize("name", ["2 workers colocated", "2 workers, 1 server"])
def test_waiting_for_parameters_counts_as_exchange(world: World, name: str) -> None:
    """The other worker's sleep is this one's exchange, and nobody's compute."""
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        torch.manual_seed(0)
        model = Net()
        setting = Setting(sub, total_steps=2, steps_per_epoch=2, model=model)
        updater = ParameterServer(servers=asked).bind(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), setting
        )
        sub.barrier(name="test.together")
        for _ in range(2):
            if sub.rank == 1:
                time.sleep(0.4)
            updater.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            updater.synchronize()
            updater.step()
        spent = updater.exchange_s
        updater.settle()
        updater.close()
        assert spent > 0.2 if sub.rank == 0 else spent < 0.2

    within(world, check, workers=workers, servers=servers)


@pytest.mark.parametrize("name", ["2 workers colocated", "2 workers, 1 server"])
def test_servers_are_told_in_which_order_parameters_are_read(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, servers, asked = arrangement(world, name)

    def check(sub: SubWorld) -> None:
        sent: list[list[int]] = []
        told = Wire.send_json

        def note(self: Wire, value: Any, *, to: int) -> None:
            if value.get("op") == "order":
                sent.append(value["chunks"])
            told(self, value, to=to)

        monkeypatch.setattr(Wire, "send_json", note)
        model = Wide()
        setting = Setting(sub, total_steps=1, steps_per_epoch=1, model=model)
        strategy = ParameterServer(servers=asked, chunk_kb=32)
        updater: Any = strategy.bind(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), setting)
        for _ in range(2):
            model(torch.ones(2, 4))
        layout = updater._layout
        names = [one for one, _ in model.named_parameters()]
        assert len(sent) == (servers or workers), "once to each server"
        for chunks in sent:
            first = [names[index] for index in layout.parameters_of(chunks[0])]
            assert all(one.startswith(("front", "back")) for one in first), "not the head, which is registered first"
        assert sorted(chunk for chunks in sent for chunk in chunks) == list(range(len(layout.chunks)))
        updater.settle()
        updater.close()

    within(world, check, workers=workers, servers=servers)
