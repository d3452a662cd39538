"""Parts of the world: worlds of their own that know nothing of each other, beside a beat that does.

    HOROVOD_DYNAMIC_PROCESS_SETS=1 python -m tests.in_world -np 4 tests/parallel/test_groups.py

With two ranks a part is one rank, which needs no process set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_jobs.comm.beat import Beat
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.errors import DataError, SetupError
from horovod_jobs.schedule import shares
from horovod_jobs.stages.train import run as train
from tests.support import blob_data, context, fit_config, train_stage

pytestmark = pytest.mark.world_size(2, 3, 4)
DYNAMIC = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") == "1"


@pytest.fixture
def part(world: World) -> Iterator[World]:
    """This rank's half of the world."""
    from horovod_jobs.comm.groups import Split

    if world.size > 2 and not DYNAMIC:
        pytest.skip("parts of several ranks want HOROVOD_DYNAMIC_PROCESS_SETS=1")
    split = Split(world, shares(world.size, 2))
    yield split.mine
    split.close()


def half(world: World) -> range:
    return next(ranks for ranks in shares(world.size, 2) if world.rank in ranks)


def test_a_part_has_numbers_of_its_own(world: World, part: World) -> None:
    mine = half(world)
    assert part.ranks == tuple(mine)
    assert (part.rank, part.size) == (mine.index(world.rank), len(mine))
    assert (part.local_rank, part.local_size) == (world.local_rank, world.local_size), "the place on the host stays"
    assert (part.host_rank, part.host_size) == (part.rank, part.size), "all ranks of this test are on one host"
    assert (part.cross_rank, part.cross_size) == (0, 1)
    assert part.is_main == (world.rank == mine.start)


@pytest.mark.parametrize("elements", [3, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_collectives_stay_in_the_part(world: World, part: World, elements: int, dtype: torch.dtype) -> None:
    # Of other lengths in each part, under one name: parts that met would not agree.
    elements += half(world).start
    mine = torch.full((elements,), world.rank + 1).to(dtype)
    wanted = sum(rank + 1 for rank in half(world))
    assert torch.equal(part.allreduce(mine, name="parts.sum"), torch.full((elements,), wanted).to(dtype))
    assert torch.equal(part.allreduce_async(mine, name="parts.async").wait(), torch.full((elements,), wanted).to(dtype))
    last = part.broadcast(mine, name="parts.broadcast", root=part.size - 1)
    assert torch.equal(last, torch.full((elements,), half(world).stop).to(dtype))
    assert part.gather_json(world.rank, name="parts.gather") == list(half(world))
    assert world.gather_json(world.rank, name="all.gather") == list(range(world.size)), "the whole is still there"


def test_an_error_in_one_part_is_none_in_the_other(world: World, part: World) -> None:
    def work() -> int:
        if world.rank == 0:
            raise DataError("only here")
        return half(world).start

    if world.rank in shares(world.size, 2)[0]:
        with pytest.raises(DataError, match="only here"):
            part.main(work, name="parts.main")
    else:
        assert part.main(work, name="parts.main") == half(world).start


def test_parts_can_be_made_again_and_in_another_way(world: World) -> None:
    from horovod_jobs.comm.groups import Split

    if not DYNAMIC:
        pytest.skip("parts of several ranks want HOROVOD_DYNAMIC_PROCESS_SETS=1")
    for count in (2, world.size, 2):
        split = Split(world, shares(world.size, count))
        mine = next(ranks for ranks in shares(world.size, count) if world.rank in ranks)
        assert split.mine.gather_json(world.rank, name="again") == list(mine)
        split.close()


@pytest.mark.skipif(DYNAMIC, reason="Horovod can form process sets here")
@pytest.mark.world_size(3, 4)
def test_without_dynamic_process_sets_the_error_says_what_to_do(world: World) -> None:
    from horovod_jobs.comm.groups import Split

    with pytest.raises(SetupError, match="HOROVOD_DYNAMIC_PROCESS_SETS=1"):
        Split(world, shares(world.size, 2))


def test_training_in_a_part_is_training_alone(world: World, part: World, shared_dir: Path) -> None:
    """Another seed in each part, at the same time, under the same names; with batch norm over the part's ranks."""
    seed = half(world).start
    stage = train_stage(seed=seed, fit=fit_config(ema_decay=0.9))

    def weights(directory: Path, place: World) -> dict[str, Any]:
        from safetensors.torch import load_file

        ctx = context(directory, world=place, data=blob_data(), name="member", seed=seed)
        train(ctx, stage)
        place.barrier(name="parts.written")
        return dict(load_file(ctx.staging / "model.safetensors"))

    ours = weights(shared_dir / f"part-{seed}", part)
    alone = weights(shared_dir / f"alone-{world.rank}", SingleWorld())
    assert ours.keys() == alone.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, alone[name], atol=1e-5), name
    first = world.gather_json(float(ours["head.weight"].sum()), name="parts.differ")
    assert first[0] != first[-1], "two seeds, two models"


def beats(world: World, *, stopped: int = 0) -> tuple[Beat, list[int], list[Any]]:
    asked: list[int] = []
    news: list[Any] = []
    beat = Beat(world, stopped=lambda: stopped, ask=asked.append, deliver=news.append, interval_s=0.02)
    beat.start()
    return beat, asked, news


def test_the_beat_brings_news_to_rank_0_and_ends_on_every_rank(world: World) -> None:
    beat, asked, news = beats(world)
    for number in range(3):
        beat.post([world.rank, number])
        time.sleep(0.01 * world.rank)
    beat.finish(failed=False)
    assert beat.over.wait(30)
    assert beat.lost is None
    assert asked == []
    wanted = [[rank, number] for rank in range(world.size) for number in range(3)]
    assert sorted(news) == (wanted if world.is_main else [])


@pytest.mark.parametrize("how", ["signal", "failure"])
def test_the_beat_asks_the_others_to_stop(world: World, how: str) -> None:
    last = world.rank == world.size - 1
    beat, asked, _ = beats(world, stopped=2 if last and how == "signal" else 0)
    if last:
        beat.finish(failed=how == "failure")
    else:
        deadline = time.monotonic() + 30
        while not asked and time.monotonic() < deadline:
            time.sleep(0.005)
        assert asked[0] == (2 if how == "signal" else 1)
        assert not beat.over.is_set(), "nobody goes before all have ended"
        beat.finish(failed=False)
    assert beat.over.wait(30)
    assert beat.signal == (2 if how == "signal" else 0)


def test_news_that_cannot_be_kept_stop_the_stages(world: World) -> None:
    def deliver(message: Any) -> None:
        raise DataError(f"no room for {message}")

    asked: list[int] = []
    beat = Beat(world, stopped=lambda: 0, ask=asked.append, deliver=deliver, interval_s=0.02)
    beat.start()
    if world.rank == world.size - 1:
        beat.post(["something"])
    deadline = time.monotonic() + 30
    while not asked and time.monotonic() < deadline:
        time.sleep(0.005)
    beat.finish(failed=False)
    assert beat.over.wait(30)
    assert asked
    assert (beat.undelivered is not None) == world.is_main
