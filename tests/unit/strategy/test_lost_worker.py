"""What servers decide when a worker has died: who waits no more, and from which step on its samples are the others'."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.strategy.base import StepTime
from horovod_jobs.strategy.parameter_server import ParameterServer
from horovod_jobs.strategy.parameter_server.coordinator import Coordinator
from horovod_jobs.strategy.parameter_server.protocol import FLAGS
from horovod_jobs.strategy.parameter_server.shards import Bounded, Flat, Shard
from horovod_jobs.strategy.parameter_server.worker import ParameterServerUpdater

LAST = 14


@given(workers=st.integers(2, 5), deaths=st.integers(1, 3), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_all_who_are_left_divide_the_samples_from_the_same_step(workers: int, deaths: int, seed: int) -> None:
    """Any pace, any moment: who makes a step by the new shares heard of them before it began, and nobody waits for the dead."""
    chance = random.Random(seed)
    coordinator = Coordinator(workers)
    alive, step = set(range(workers)), [1] * workers  # the step that each is in
    gone_from = [[0] * workers for _ in range(workers)]  # what each has been told
    split: list[dict[int, frozenset[int]]] = [{} for _ in range(workers)]  # by whom each thinks a step is made
    waiting: set[int] = set()
    moments = sorted(chance.randrange(3 * LAST) for _ in range(min(deaths, workers - 1)))

    def plan(worker: int) -> None:
        told = gone_from[worker]
        split[worker][step[worker]] = frozenset(
            one for one in range(workers) if not told[one] or step[worker] < told[one]
        )

    def answer(found: list[tuple[int, list[float]]]) -> None:
        for other, told in found:
            assert len(told) == FLAGS + workers
            gone_from[other] = [int(value) for value in told[FLAGS:]]
            waiting.discard(other)
            step[other] += 1
            if step[other] <= LAST:
                plan(other)

    for worker in range(workers):
        plan(worker)
    for turn in range(100 * LAST):
        if moments and turn >= moments[0]:
            moments.pop(0)
            dead = chance.choice(sorted(alive))
            alive.discard(dead)
            waiting.discard(dead)
            _, _, found = coordinator.drop(dead)
            answer(found)
        ready = [one for one in alive - waiting if step[one] <= LAST]
        if not ready:
            break
        worker = chance.choice(ready)
        waiting.add(worker)
        answer(coordinator.note(worker, step=step[worker], hold=step[worker] == LAST, flags=[0.0] * FLAGS))
    assert not waiting, "nobody waits for ever"
    assert all(step[one] == LAST + 1 for one in alive)
    for number in range(1, LAST + 1):
        assert len({split[one][number] for one in alive}) == 1, f"step {number} is divided in one way"


def test_readers_who_wait_for_a_worker_that_died_are_let_go() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    shard = Flat(0, 0, parameter, torch.optim.SGD([parameter], lr=1.0), workers=3, shared=False)
    for buffer in shard.buffers:
        buffer.zero_()
    answered: list[int] = []

    def reply(shard: Shard, worker: int) -> None:
        answered.append(worker)

    rule = Bounded([shard], workers=3, options=lambda shard, worker: {}, reply=reply, mean=False, staleness=1)
    for worker in (0, 1, 0, 1):
        rule.pushed(shard, worker)
    assert answered == [0, 1], "the third worker has not made its first step"
    rule.drop(2)
    assert sorted(answered) == [0, 0, 1, 1]
    rule.pushed(shard, 0)
    rule.pushed(shard, 0)
    assert answered.count(0) == 3, "the bound holds among those that are left"


def test_an_average_of_weights_is_of_those_that_are_left() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    shard = Flat(0, 0, parameter, None, workers=4, shared=False)
    rule = Bounded(
        [shard],
        workers=4,
        options=lambda shard, worker: {},
        reply=lambda shard, worker: None,
        mean=True,
        staleness=None,
    )
    rule.drop(0)
    rule.drop(3)
    shard.buffers[1].fill_(1.0)
    rule.pushed(shard, 1)
    assert parameter.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("arguments", "outlives", "exact"),
    [
        ({}, False, True),
        ({"consistency": "async"}, True, False),
        ({"consistency": "ssp"}, True, False),
        ({"consistency": "async", "servers": "colocated"}, False, False),
        ({"averaging": "weights"}, False, False),
    ],
)
def test_what_the_strategy_says_of_itself(arguments: dict[str, Any], outlives: bool, exact: bool) -> None:
    strategy = ParameterServer(**arguments)
    assert (strategy.outlives_ranks, strategy.exact) == (outlives, exact)


def test_shares_are_those_of_the_next_step() -> None:
    world = SingleWorld()
    updater = cast(Any, ParameterServerUpdater.__new__(ParameterServerUpdater))
    updater.world, updater._step, updater._next = world, 6, 7
    updater._seat = SimpleNamespace(workers=(0, 1, 2))
    updater._flags = SimpleNamespace(gone_from=[0, 8, 0])
    assert updater.shares is None
    updater._step = 7
    assert updater.shares is None, "within step 7 its shares hold"
    updater.finish_step(StepTime(0.1, 0.1, 1))
    assert updater.shares == (0.5, 0.0, 0.5)
    world.lost = ({"rank": 1, "host": "here"},)
    assert updater.shares is None, "the world is smaller now and divides evenly"
