"""A world of one: every collective gives back what it was given."""

from __future__ import annotations

import pytest
import torch

from horovod_jobs.comm.world import OPS, SingleWorld, Traffic


@pytest.mark.parametrize("op", OPS)
def test_reductions_of_one_are_the_value_in_a_tensor_of_its_own(op: str) -> None:
    mine = torch.tensor([1.0, -2.0])
    got = SingleWorld().allreduce(mine, name="x", op=op)
    assert torch.equal(got, mine)
    got += 1
    assert mine.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_a_gathering_of_one_has_a_rank_in_front(shape: tuple[int, ...]) -> None:
    mine = torch.ones(shape, dtype=torch.uint8)
    got = SingleWorld().allgather_async(mine, name="x").wait()
    assert got.shape == (1, *shape)
    assert torch.equal(got[0], mine)


def test_the_exchange_of_one_steps_and_sends_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    exchange = SingleWorld().distribute(
        optimizer, [("w", weight)], accumulate=1, compression="fp16", num_groups=0, predivide=4.0
    )
    exchange.zero_grad()
    weight.sum().backward()
    exchange.synchronize()
    exchange.step()
    assert weight.tolist() == [0.5, 0.5]
    assert exchange.traffic == Traffic(steps=1)
