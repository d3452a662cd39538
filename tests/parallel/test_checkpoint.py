"""What each rank has of its own is in the checkpoint, and comes back to it, or to those that are left."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.training.checkpoint import Checkpoints

LOG = logging.getLogger("tests")


def checkpoints(directory: Path, world: World) -> Checkpoints:
    return Checkpoints(directory, keep=2, world=world, log=LOG)


def test_each_rank_gets_its_own_state_back(world: World, shared_dir: Path) -> None:
    mine = {"residual": torch.arange(3.0) + 10 * world.rank}
    checkpoints(shared_dir, world).save({"step": 7}, step=7, rank_state=mine)
    loaded = checkpoints(shared_dir, world).load_last()
    assert loaded is not None
    state, own = loaded
    assert state == {"step": 7}
    assert len(own) == 1
    assert torch.equal(own[0]["residual"], mine["residual"])


def test_a_smaller_world_takes_over_the_state_of_ranks_that_are_gone(world: World, shared_dir: Path) -> None:
    checkpoints(shared_dir, world).save({}, step=1, rank_state={"residual": torch.full((2,), float(world.rank))})
    world.barrier(name="test.saved")
    loaded = checkpoints(shared_dir, SingleWorld()).load_last()
    assert loaded is not None
    assert [part["residual"].tolist() for part in loaded[1]] == [[float(rank)] * 2 for rank in range(world.size)]
    world.barrier(name="test.loaded")


def test_a_damaged_state_of_one_rank_leaves_the_whole_checkpoint_aside(world: World, shared_dir: Path) -> None:
    made = checkpoints(shared_dir, world)
    for step in (1, 2):
        made.save({"step": step}, step=step, rank_state={"residual": torch.full((2,), float(world.rank))})
    if world.is_main:
        path = shared_dir / "step-000000002" / "rank-1.pt"
        path.write_bytes(path.read_bytes()[:-1])
    world.barrier(name="test.damaged")
    loaded = made.load_last()
    assert loaded is not None
    assert loaded[0] == {"step": 1}
