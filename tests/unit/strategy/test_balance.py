"""Shares follow speeds, hold still where nothing is to be won, and never starve a rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.sharding import micro_batches
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.balance import (
    Balancer,
    Rule,
    excess,
    grained,
    next_shares,
    proportional,
    seconds_a_sample,
)
from horovod_jobs.strategy.base import Setting, StepTime

RULE = Rule()
speeds_of = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9)


class Ranks(SingleWorld):
    """Rank 0 of several whose times it is told: the sum over ranks is made here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seconds = [1.0] * size
        self.collectives = 0

    def allreduce(self, tensor, *, name, op="sum"):
        self.collectives += 1
        total = tensor.clone()
        total[1 : self.size] = torch.tensor(self.seconds[1:], dtype=torch.float64)
        total[self.size] = 64.0
        total[self.size + 1] *= self.size
        return total


def look(balancer: Balancer, ranks: Ranks, seconds: list[float], *, steps: int = 10) -> tuple[float, ...] | None:
    """A window of steps in which the ranks need so many seconds a sample."""
    ranks.seconds = seconds
    samples = round(64 * (balancer.shares or [1 / ranks.size] * ranks.size)[0])
    for _ in range(steps):
        balancer.note(StepTime(total_s=1.0, compute_s=seconds[0] * samples, samples=samples))
    balancer.reshare()
    return balancer.shares


@given(speeds=speeds_of, floor=st.floats(0.0, 0.3))
def test_proportional_shares_keep_the_floor_and_the_order(speeds, floor):
    shares = proportional(speeds, floor=floor)
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= min(floor, 1 / len(speeds)) * (1 - 1e-9)
    for (speed, share), (other, least) in pairwise(zip(speeds, shares, strict=True)):
        assert (share >= least * (1 - 1e-9)) if speed >= other else (share <= least * (1 + 1e-9))


@given(shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9))
def test_grained_shares_add_up_exactly_in_any_order(shares):
    total = sum(shares)
    made = grained([share / total for share in shares])
    assert sum(made) == sum(reversed(made)) == 1.0
    assert all(abs(a - b / total) < 1e-5 for a, b in zip(made, shares, strict=True))


@given(speeds=speeds_of, start=st.data())
def test_one_change_is_limited_keeps_the_sum_and_the_floor(speeds, start):
    size = len(speeds)
    floor = RULE.floor / size
    shares = proportional(start.draw(st.lists(st.floats(0.01, 100.0), min_size=size, max_size=size)), floor=floor)
    made = next_shares(shares, speeds, rule=RULE, floor=floor)
    assert sum(made) == 1.0
    assert min(made) >= floor - 1e-5
    assert max(abs(a - b) for a, b in zip(made, shares, strict=True)) <= RULE.largest_change / size + 1e-5
    assert excess(made, speeds) <= excess(shares, speeds) + 1e-4 or min(proportional(speeds, floor=floor)) == floor


@given(speeds=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=6))
def test_a_sequence_of_changes_ends_where_all_are_ready_together(speeds):
    shares = (1 / len(speeds),) * len(speeds)
    for _ in range(60):
        shares = next_shares(shares, speeds, rule=RULE, floor=0.0)
    assert excess(shares, speeds) < 1e-3


def test_excess_is_what_a_step_could_lose():
    assert excess([0.5, 0.5], [1.0, 1.0]) == pytest.approx(0.0)
    # One rank half as fast: 0.5 / 0.5 = 1 instead of 2/3.
    assert excess([0.5, 0.5], [1.0, 0.5]) == pytest.approx(0.5)
    assert excess([2 / 3, 1 / 3], [1.0, 0.5]) == pytest.approx(0.0)


def test_two_slow_moments_do_not_move_the_measure_and_slices_of_time_count_with_their_mean():
    steps = [(0.1, 10)] * 20
    assert seconds_a_sample(steps) == pytest.approx(0.01)
    steps[3] = steps[17] = (9.0, 10)
    assert seconds_a_sample(steps) == pytest.approx(0.01)
    # A processor that is granted every other step: the mean, where a median of steps would say 0.01 or 0.03.
    assert seconds_a_sample([(0.1, 10), (0.3, 10)] * 10) == pytest.approx(0.02)
    assert seconds_a_sample([(0.1, 10), (0.0, 0)] * 10) == pytest.approx(0.01), "steps without samples"
    assert seconds_a_sample([(0.1, 0)] * 5) is None


def test_shares_follow_a_slow_rank_and_it_wins_back():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    for _ in range(12):
        look(balancer, ranks, [1.0, 2.0])
    assert balancer.shares == pytest.approx((2 / 3, 1 / 3), abs=0.02)
    for _ in range(30):
        look(balancer, ranks, [1.0, 1000.0])
    assert balancer.shares[1] == pytest.approx(0.05, abs=1e-3), "the floor: a tenth of an even share"
    for _ in range(30):
        look(balancer, ranks, [1.0, 1.0])
    assert balancer.shares == pytest.approx((0.5, 0.5), abs=0.02)


def test_even_ranks_with_noise_are_left_alone():
    ranks = Ranks(3)
    balancer = Balancer(ranks, every=10)
    noise = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert look(balancer, ranks, (1 + 0.04 * torch.rand(3, generator=noise)).tolist()) is None


def test_shares_that_have_arrived_hold_still_under_noise():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    for _ in range(12):
        arrived = look(balancer, ranks, [1.0, 2.0])
    noise = torch.Generator().manual_seed(0)
    for _ in range(100):
        factors = 1 + 0.03 * torch.rand(2, generator=noise)
        assert look(balancer, ranks, [float(factors[0]), 2 * float(factors[1])]) == arrived


def test_they_begin_above_one_threshold_and_end_below_another():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    assert look(balancer, ranks, [1.0, 1.08]) is None, "an excess of 4 % is below the first"
    look(balancer, ranks, [1.0, 1.4])
    moved = balancer.shares
    assert moved is not None
    even = [0.5 / 0.5 * a / b for a, b in zip([1.0, 1.0], moved, strict=True)]
    scale = [even[0], even[1] * 1.08]  # at these shares an excess of about 4 % again
    assert look(balancer, ranks, scale) != moved, "once they move they go on"


@given(
    batch=st.integers(2, 300),
    size=st.integers(2, 8),
    accumulate=st.integers(1, 3),
    slow=st.lists(st.floats(0.001, 1000.0), min_size=8, max_size=8),
)
def test_no_micro_batch_is_ever_empty_where_even_shares_fill_them(batch, size, accumulate, slow):
    batch -= batch % (size * accumulate)
    if batch < 2 * size * accumulate:
        return
    ranks = Ranks(size)
    balancer = Balancer(ranks, every=5, accumulate=accumulate)
    balancer._shares = (1 / size,) * size
    for _ in range(20):
        speeds = [1 / each for each in slow[:size]]
        balancer._follow(balancer._shares, speeds, floor=balancer._floor(batch))
    for rank in range(size):
        parts = micro_batches(torch.arange(batch), rank=rank, size=size, accumulate=accumulate, shares=balancer.shares)
        assert min(map(len, parts)) >= 1


def test_a_rank_without_a_sample_changes_nothing():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    assert look(balancer, ranks, [1.0, 0.0]) is None
    assert len(balancer.describe()["history"]) == 1


def test_too_few_steps_are_kept_for_the_next_look_without_a_collective():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    assert look(balancer, ranks, [1.0, 2.0], steps=3) is None
    assert ranks.collectives == 0
    assert look(balancer, ranks, [1.0, 2.0], steps=3) is not None
    assert ranks.collectives == 1


def test_a_checkpoint_keeps_shares_and_history_and_another_world_starts_evenly():
    ranks = Ranks(2)
    first, second, third = Balancer(ranks, every=10), Balancer(ranks, every=10), Balancer(Ranks(3), every=10)
    look(first, ranks, [1.0, 2.0])
    second.restore(first.state())
    third.restore(first.state())
    assert second.shares == first.shares is not None
    assert second.describe() == first.describe()
    assert look(second, ranks, [1.0, 2.0]) == look(first, ranks, [1.0, 2.0])
    assert second.describe()["history"][-1]["step"] == 20
    assert third.shares is None


def test_the_history_stays_short():
    ranks = Ranks(2)
    balancer = Balancer(ranks, every=10)
    for _ in range(700):
        look(balancer, ranks, [1.0, 2.0], steps=5)
    steps = [entry["step"] for entry in balancer.describe()["history"]]
    assert 100 < len(steps) <= 256
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (5, 3500)


def test_a_world_of_one_has_nothing_to_share():
    parameter = torch.nn.Parameter(torch.zeros(1))
    updater = Allreduce(balance="throughput").bind(
        torch.optim.SGD([parameter], lr=0.1), [("p", parameter)], Setting(SingleWorld())
    )
    assert updater.reshare_every is None
    assert updater.shares is None
    updater.finish_step(StepTime(total_s=1.0, compute_s=1.0, samples=1))
    assert updater.describe()["balance"]["history"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": "fair"}, "strategy.balance=fair is not known; use none or throughput"),
        ({"balance_every": 4}, "strategy.balance_every=4 is too few steps to measure a rank; use 5 or more"),
    ],
)
def test_what_cannot_be_used_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Allreduce(**settings)
