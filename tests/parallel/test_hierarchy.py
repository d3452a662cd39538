"""Sums in two levels, on a layout of hosts that is made up: four ranks as two hosts of two, as three and one, and as they are.

HOROVOD_DYNAMIC_PROCESS_SETS=1 python -m tests.in_world -np 4 tests/parallel/test_hierarchy.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from horovod_jobs.comm.world import World
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.base import Setting, Updater
from horovod_jobs.strategy.compression.exchange import MethodExchange
from horovod_jobs.strategy.hierarchical import Hierarchical
from tests.support import SmallNet, blobs

LAYOUTS = {
    "two hosts of two": [0, 0, 1, 1],
    "three and one": [0, 1, 0, 0],
    "one host": [0] * 4,
    "one rank a host": [0, 1, 2, 3],
}
pytestmark = [
    pytest.mark.world_size(4),
    pytest.mark.skipif(
        os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") != "1", reason="wants HOROVOD_DYNAMIC_PROCESS_SETS=1"
    ),
]


def trained(world: World, updater_of: object, *, accumulate: int) -> nn.Module:
    """A small net after ten updates, each over a batch that the ranks share."""
    torch.manual_seed(0)
    model = SmallNet(
        num_classes=3, input_shape=(1, 6, 6)
    ).eval()  # Batch norm by its running figures: no sums over a batch.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = updater_of(optimizer, list(model.named_parameters()), Setting(world, accumulate=accumulate))  # type: ignore[operator]
    inputs, targets = blobs(16 * world.size * accumulate, seed=5)
    for _ in range(10):
        step.zero_grad()
        for part in range(accumulate):
            mine = slice(part * world.size + world.rank, None, world.size * accumulate)
            loss = nn.functional.cross_entropy(model(inputs[mine]), targets[mine], reduction="sum")
            (loss / len(inputs)).backward()
        step.synchronize()
        step.step()
    step.close()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_levels_give_the_flat_sum(world: World, layout: str, accumulate: int) -> None:
    method = Hierarchical(hosts=LAYOUTS[layout])
    made = trained(
        world, lambda opt, named, setting: MethodExchange(opt, named, setting, method), accumulate=accumulate
    )
    flat = trained(world, Allreduce(tune=False).bind, accumulate=accumulate)
    for (name, ours), theirs in zip(made.named_parameters(), flat.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
        same = world.gather_json(ours.double().sum().item(), name="hierarchy.same")
        assert len(set(same)) == 1, "the same on every rank to the last bit"
    wanted = 1 if layout in ("one host", "one rank a host") else 2
    assert method.describe()["levels"] == wanted
    if layout == "three and one":
        assert method.describe() == {"levels": 2, "hosts": 2, "ranks_a_host": 3}


def test_only_leaders_send_between_hosts(world: World) -> None:
    layout = LAYOUTS["two hosts of two"]
    sent: list[int] = []

    def updater(opt: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], setting: Setting) -> MethodExchange:
        exchange = MethodExchange(opt, named, setting, Hierarchical(hosts=layout))
        close = exchange.close
        exchange.close = lambda: (sent.append(exchange.traffic.sent_bytes), close())[1]  # type: ignore[method-assign]
        return exchange

    model = trained(world, updater, accumulate=1)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert sent == [10 * size * (3 if world.rank in (0, 2) else 1)], "up, across and down; the others only up"


def test_the_strategy_finds_the_hosts_itself(world: World) -> None:
    kept: list[Updater] = []

    def updater(opt: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], setting: Setting) -> Updater:
        kept.append(Allreduce(hierarchical=True).bind(opt, named, setting))
        return kept[0]

    trained(world, updater, accumulate=1)
    assert kept[0].describe()["method"]["levels"] == 1, "the ranks of this test are on one host"
