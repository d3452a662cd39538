"""Synchronised batch norm against torch's own on the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from horovod_jobs.comm.world import World
from horovod_jobs.training.batchnorm import SyncBatchNorm, synchronise


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 3, 3),
        nn.BatchNorm2d(3, affine=False),
        nn.Flatten(1),
    )


@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (8, 0)], ids=str)
@pytest.mark.world_size(2)
def test_shares_of_a_batch_train_like_the_whole(world: World, sizes: tuple[int, int]) -> None:
    whole = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 5
    start = sum(sizes[: world.rank])
    mine = whole[start : start + sizes[world.rank]].clone().requires_grad_()
    alone, shared = net(), net()
    whole.requires_grad_()
    synchronise(shared, world=world)
    assert isinstance(shared[1], SyncBatchNorm)
    for step in range(3):
        weights = torch.randn(8, 48, generator=torch.Generator().manual_seed(step))
        (alone(whole) * weights).sum().backward()
        (shared(mine) * weights[start : start + sizes[world.rank]]).sum().backward()
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        total = world.allreduce(ours.grad, name="test.grad")
        assert torch.allclose(total, theirs.grad, rtol=1e-4, atol=1e-4)
    assert whole.grad is not None
    assert torch.allclose(mine.grad, whole.grad[start : start + sizes[world.rank]], rtol=1e-4, atol=1e-4)
    for key, value in alone.state_dict().items():
        assert torch.allclose(shared.state_dict()[key].double(), value.double(), rtol=1e-5, atol=1e-6), key
    assert list(shared.state_dict()) == list(alone.state_dict()), "weights go back into the plain model"
    assert torch.allclose(shared.eval()(whole), alone.eval()(whole), atol=1e-5)


def test_statistics_survive_a_large_mean(world: World) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by more than the variance here."""
    layer = nn.BatchNorm1d(1)
    x = 10000.0 + torch.linspace(-0.5, 0.5, 64)[:, None]
    wanted = copy.deepcopy(layer)
    wanted(x)
    holder = nn.Sequential(layer)
    synchronise(holder, world=world)
    holder(x[world.rank :: world.size])
    assert torch.allclose(holder[0].running_var, wanted.running_var, rtol=1e-2)
