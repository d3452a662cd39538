"""Collectives, and how errors are agreed."""

from __future__ import annotations

import time

import pytest
import torch

from horovod_jobs.comm.world import World
from horovod_jobs.errors import DataError, WorldError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (300, 400)])
def test_allreduce_sums_over_ranks(world: World, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mine = torch.full(shape, world.rank + 1).to(dtype)
    total = world.allreduce(mine, name="test.sum")
    assert total.dtype == dtype
    assert total.shape == mine.shape
    assert torch.equal(total, torch.full(shape, world.size * (world.size + 1) // 2).to(dtype))
    assert torch.equal(mine, torch.full(shape, world.rank + 1).to(dtype)), "the argument is left as it was"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_small_sums_under_way_beside_others(world: World, dtype: torch.dtype) -> None:
    mine = torch.arange(5).to(dtype) + world.rank
    small = [world.sum_in_order_async(mine * times, name=f"test.order.{times}") for times in (1, 2, 3)]
    large = world.allreduce_async(torch.full((70000,), 1.0), name="test.order.large")
    at_once = world.allreduce(mine, name="test.order.at_once")
    assert torch.equal(large.wait(), torch.full((70000,), float(world.size)))
    wanted = torch.arange(5) * world.size + world.size * (world.size - 1) // 2
    assert torch.equal(at_once, wanted.to(dtype))
    for times, handle in reversed(list(zip((1, 2, 3), small, strict=True))):  # Taken back in any order.
        assert torch.equal(handle.wait(), (times * wanted).to(dtype))
    assert torch.equal(mine, torch.arange(5).to(dtype) + world.rank), "the argument is left as it was"


@pytest.mark.parametrize(
    ("op", "wanted"), [("min", lambda n: 0.0), ("max", lambda n: n - 1.0), ("average", lambda n: (n - 1) / 2)]
)
@pytest.mark.parametrize("size", [4, 40000])
def test_other_reductions(world: World, op: str, wanted, size: int) -> None:
    mine = torch.full((size,), float(world.rank))
    assert torch.equal(world.allreduce(mine, name=f"test.{op}", op=op), torch.full((size,), wanted(world.size)))


def test_broadcast_gives_the_roots_tensor(world: World) -> None:
    got = world.broadcast(torch.arange(6).reshape(2, 3) * (world.rank + 1), name="test.broadcast", root=1)
    assert torch.equal(got, torch.arange(6).reshape(2, 3) * 2)


def test_gather_keeps_order_and_lengths(world: World) -> None:
    got = world.gather_bytes(b"x" * world.rank, name="test.bytes")
    assert got == [b"x" * rank for rank in range(world.size)]
    assert world.gather_json({"rank": world.rank}, name="test.json") == [{"rank": rank} for rank in range(world.size)]


def test_main_runs_once_and_tells_everyone(world: World) -> None:
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    assert world.main(work, name="test.main") == {"answer": 42}
    assert len(calls) == int(world.is_main)


def test_an_error_on_rank_0_is_raised_on_every_rank(world: World) -> None:
    def work() -> None:
        raise DataError("file is missing (x); fetch it")

    with pytest.raises(DataError, match=r"file is missing \(x\); fetch it"):
        world.main(work, name="test.main.error")


def test_an_error_on_one_rank_is_raised_on_every_rank(world: World) -> None:
    with pytest.raises(DataError, match="only here"), world.agreed("test"):
        if world.rank == world.size - 1:
            raise DataError("only here")


def test_a_bug_on_one_rank_stops_the_others_with_its_rank(world: World) -> None:
    last = world.size - 1
    wanted = ZeroDivisionError if world.rank == last else WorldError
    with pytest.raises(wanted) as caught, world.agreed("test"):
        if world.rank == last:
            _ = 1 / 0
    if world.rank != last:
        assert f"rank {last} failed" in str(caught.value)
        assert "ZeroDivisionError" in str(caught.value)


def test_who_waits_leaves_its_core_to_others(world: World) -> None:
    """What rank 0 does alone (latency, an export) has the machine: the build of launch/build_horovod.sh lets waiting threads sleep."""
    world.barrier(name="test.asleep.before")
    spent, last = time.thread_time(), world.rank == world.size - 1
    if last:
        time.sleep(2)
    world.allreduce_async(torch.ones(100000), name="test.asleep").wait()
    share = (time.thread_time() - spent) / 2
    assert share < 0.2, f"rank {world.rank} was busy for {share:.0%} of two seconds"
