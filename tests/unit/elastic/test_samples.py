"""However ranks come, go and commit, the weights that survive have seen every sample of an epoch exactly once.

Upstream's ElasticSampler keeps one number of processed samples and assumes that ranks go in lock step and divide what is left anew:
indices are lost or repeated when they do not (upstream issue 3143). Here a commit names a global batch of an epoch, and the batches of
an epoch are the same for every number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_jobs.comm.member import Kept
from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.sharding import epoch_permutation, micro_batches, num_batches
from horovod_jobs.strategy.elastic import Commits, choose, passes


@dataclass
class Rank:
    """What outlives a world: this rank's commits. ``seen`` is part of the weights' state, as the sum over samples would be."""

    kept: dict[str, Kept] = field(default_factory=dict)

    def commits(self, every: int) -> Commits:
        return Commits("stage", every_steps=every, kept=self.kept)


def train(
    n: int, *, batch: int, epochs: int, every: int, seed: int, fates: list[tuple[int, list[int], int]]
) -> list[list[int]]:
    """Samples of each epoch in the order in which the surviving weights saw them.

    ``fates``: for each world in turn, the step after which it ends, which of its ranks are lost, and how many join.
    """
    ranks = [Rank(), Rank()]
    disk: dict[str, object] | None = None
    queue = list(fates)
    while True:
        state = restore(ranks, disk)
        epoch, position, step, seen = (
            state["epoch"],
            state["batch"],
            state["step"],
            [list(part) for part in state["seen"]],
        )  # type: ignore[call-overload]
        until, lost, joining = queue.pop(0) if queue else (10**9, [], 0)
        made = 0
        while epoch < epochs and made < until:
            if position == num_batches(
                n, global_batch=batch
            ):  # The loop ends an epoch after the commit of its last step.
                epoch, position = epoch + 1, 0
                continue
            order = epoch_permutation(n, seed=seed, epoch=epoch)
            indices = order.split(batch)[position]
            accumulate = passes(ranks=3, size=len(ranks))
            for rank in range(len(ranks)):
                for part in micro_batches(indices, rank=rank, size=len(ranks), accumulate=accumulate):
                    seen[epoch] += part.tolist()
            step, position, made = step + 1, position + 1, made + 1
            snapshot = {"epoch": epoch, "batch": position, "step": step, "seen": [list(part) for part in seen]}
            for rank in ranks:
                commits = rank.commits(every)
                if commits.due(step):
                    commits.keep(snapshot, step=step)
        if epoch == epochs:
            return seen
        if not lost:  # A change that was planned: all ranks stop after the same step, with a checkpoint.
            disk = {"epoch": epoch, "batch": position, "step": step, "seen": [list(part) for part in seen]}
        gone = {number % len(ranks) for number in lost}
        ranks = [rank for number, rank in enumerate(ranks) if number not in gone] + [Rank() for _ in range(joining)]
        ranks = ranks or [Rank()]  # All are lost: the driver starts others, which find what is on disk.


def restore(ranks: list[Rank], disk: dict[str, object] | None) -> dict[str, object]:
    """As ``Commits.newer`` does: the newest commit of any rank, unless the checkpoint is as new."""
    found = choose([rank.kept["stage"].step if "stage" in rank.kept else None for rank in ranks])
    if found is None or (disk is not None and int(disk["step"]) >= found[0]):  # type: ignore[call-overload]
        return disk or {"epoch": 0, "batch": 0, "step": 0, "seen": [[], [], []]}
    saved, _ = ranks[found[1]].commits(1).newer(None, SingleWorld()) or ({}, [])
    return saved


FATES = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 3)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 17), every=st.integers(1, 7), seed=st.integers(0, 5), fates=FATES)
def test_every_sample_of_an_epoch_is_seen_exactly_once(
    n: int, batch: int, every: int, seed: int, fates: list[tuple[int, list[int], int]]
) -> None:
    seen = train(n, batch=batch, epochs=2, every=every, seed=seed, fates=fates)
    for epoch in range(2):
        assert sorted(seen[epoch]) == list(range(n))
        # And in the same global batches as without any change of the world.
        order = epoch_permutation(n, seed=seed, epoch=epoch)
        start = 0
        for indices in order.split(batch):
            assert set(seen[epoch][start : start + len(indices)]) == set(indices.tolist())
            start += len(indices)


@given(size=st.integers(1, 64), ranks=st.integers(1, 64), batch=st.integers(1, 4096))
def test_no_backward_pass_sees_more_samples_than_at_the_start(size: int, ranks: int, batch: int) -> None:
    indices = torch.arange(batch)
    largest = max(
        len(part) for rank in range(ranks) for part in micro_batches(indices, rank=rank, size=ranks, accumulate=1)
    )
    accumulate = passes(ranks=ranks, size=size)
    for rank in range(size):
        parts = micro_batches(indices, rank=rank, size=size, accumulate=accumulate)
        assert len(parts) == accumulate
        assert max(map(len, parts)) <= largest
    assert (accumulate - 1) * size < ranks, "and not in more passes than that takes"


def test_the_newest_commit_of_any_rank_is_taken() -> None:
    assert choose([None, None]) is None
    assert choose([20, 30, None, 30]) == (30, 1)


def test_a_commit_is_a_copy_and_the_earlier_stage_s_goes() -> None:
    weights = torch.ones(3)
    kept: dict[str, Kept] = {}
    Commits("first", every_steps=2, kept=kept).keep({"w": weights, "fit": {"step": 2}}, step=2)
    weights.zero_()
    saved, own = Commits("first", every_steps=2, kept=kept).newer(None, SingleWorld()) or ({}, [])
    assert torch.equal(saved["w"], torch.ones(3))
    assert own == []
    checkpoint = ({"fit": {"step": 2}}, [])
    assert Commits("first", every_steps=2, kept=kept).newer(checkpoint, SingleWorld()) is checkpoint, (
        "as new, and on disk"
    )
    second = Commits("second", every_steps=2, kept=kept)
    assert second.newer(None, SingleWorld()) is None
    second.keep({"fit": {"step": 4}}, step=4)
    assert list(kept) == ["second"]


def test_commits_are_due_every_so_many_steps() -> None:
    commits = Commits("stage", every_steps=3, kept={})
    assert [step for step in range(1, 10) if commits.due(step)] == [3, 6, 9]
