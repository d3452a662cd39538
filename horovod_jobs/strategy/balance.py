"""Uneven ranks: each rank's share of the global batch follows its measured speed.

The gradient of a global batch is a sum over its samples, whoever computes which: so shares change the time of a step and, but
for rounding, not its result. A step takes as long as its slowest rank, which is shortest when all are ready together. Therefore
a rank's speed is its samples a second at the share it has, and shares go step by step towards where all take the same time.

Two thresholds keep them still when ranks are even or measurements noisy (hysteresis): they begin to move when a step could be
shorter by ``wake``, and stop when it could be by less than ``rest``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from horovod_jobs.comm.world import World
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.base import StepTime

# Shares are multiples of this: sums of them are exact in floating point, so every rank cuts a batch at the same samples.
_GRAIN = 2.0**-20
_BLOCKS = 5
_FEWEST_STEPS = _BLOCKS
_HISTORY = 256

Shares = tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    """How shares follow speeds. What is counted in even shares is relative to 1 / ranks."""

    wake: float = 0.05  # shares begin to move when the slowest rank's time is above the ideal by this part
    rest: float = 0.02  # and stop moving below this
    smoothing: float = 0.5  # part of the way to the speeds' own proportions that one change goes
    floor: float = 0.1  # smallest share of a rank, in even shares: who has no sample cannot show that it is fast again
    largest_change: float = 0.5  # of any rank's share in one go, in even shares


def excess(shares: Sequence[float], speeds: Sequence[float]) -> float:
    """By which part the slowest rank's time is above the time that all would take at shares proportional to ``speeds``."""
    slowest = max(share / speed for share, speed in zip(shares, speeds, strict=True))
    return slowest * sum(speeds) - 1.0


def proportional(speeds: Sequence[float], *, floor: float) -> Shares:
    """Shares proportional to ``speeds`` (any unit, above 0), none below ``floor``; they add up to 1."""
    if floor * len(speeds) >= 1.0:
        return (1.0 / len(speeds),) * len(speeds)
    low: set[int] = set()
    while True:
        rest = sum(speed for rank, speed in enumerate(speeds) if rank not in low)
        left = 1.0 - floor * len(low)
        found = tuple(floor if rank in low else left * speed / rest for rank, speed in enumerate(speeds))
        below = {rank for rank, share in enumerate(found) if share < floor} - low
        if not below:
            return found
        low |= below


def next_shares(shares: Sequence[float], speeds: Sequence[float], *, rule: Rule, floor: float) -> Shares:
    """One smoothed and limited change of ``shares`` towards ``speeds``; all are at least ``floor`` if they were."""
    target = proportional(speeds, floor=floor)
    changes = [rule.smoothing * (goal - share) for goal, share in zip(target, shares, strict=True)]
    # One factor for all, so that what some lose is still what others win.
    largest = max(abs(change) for change in changes)
    limit = rule.largest_change / len(shares)
    factor = min(1.0, limit / largest) if largest > 0 else 0.0
    return grained([share + factor * change for share, change in zip(shares, changes, strict=True)])


def grained(shares: Sequence[float]) -> Shares:
    """The nearest shares that are multiples of the grain and add up to exactly 1."""
    grains = [round(share / _GRAIN) for share in shares]
    # Rounding leaves a grain or two over: they go where they matter least.
    grains[grains.index(max(grains))] += round(1 / _GRAIN) - sum(grains)
    return tuple(count * _GRAIN for count in grains)


def seconds_a_sample(steps: Sequence[tuple[float, int]]) -> float | None:
    """Median over blocks of consecutive steps of (seconds, samples); None where there are no samples.

    Within a block times add up, so a processor that is granted in slices counts with its mean; of the blocks, two that fell
    into a slow moment do not matter.
    """
    edges = [len(steps) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    found = []
    for start, end in pairwise(edges):
        samples = sum(count for _, count in steps[start:end])
        if samples:
            found.append(sum(seconds for seconds, _ in steps[start:end]) / samples)
    return statistics.median(found) if found else None


class Even:
    """Even shares, whatever is measured: what is used where nothing is balanced."""

    @property
    def every(self) -> int | None:
        """Steps between calls of ``reshare``; None: never."""
        return None

    @property
    def shares(self) -> Shares | None:
        """The shares in force; None as long as they are even."""
        return None

    def note(self, spent: StepTime) -> None:
        """Take a step's times."""

    def reshare(self) -> None:
        """Collective. Look at all ranks' speeds and maybe change the shares: on all ranks alike."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's shares; a world of another size starts evenly."""

    def describe(self) -> dict[str, Any]:
        """What was measured and decided, as JSON."""
        return {}


class Balancer(Even):
    """Measures this rank, agrees with the others, and holds the shares.

    Args:
        world: whose ranks share the batch.
        every: steps between looks at the speeds.
        accumulate: micro-batches a step; the floor leaves each of them a sample.
        rule: how shares follow speeds.
    """

    def __init__(self, world: World, *, every: int, accumulate: int = 1, rule: Rule | None = None) -> None:
        self._world, self._every, self._accumulate, self._rule = world, every, accumulate, rule or Rule()
        self._shares: Shares | None = None
        self._moving = False
        self._step = 0
        self._window: list[StepTime] = []
        self._history: list[dict[str, Any]] = []

    @property
    def every(self) -> int | None:
        # A world of one has nothing to share.
        return self._every if self._world.size > 1 else None

    @property
    def shares(self) -> Shares | None:
        return self._shares

    def note(self, spent: StepTime) -> None:
        self._step += 1
        if self._world.size > 1:
            self._window.append(spent)

    def reshare(self) -> None:
        if len(self._window) < _FEWEST_STEPS:
            return  # The end of an epoch cut the window short, on every rank.
        seconds, batch, step_s = self._exchange()
        self._window = []
        shares = self._shares or (1.0 / self._world.size,) * self._world.size
        if min(seconds) > 0.0:  # A rank without a sample has not been measured.
            self._follow(shares, [1.0 / each for each in seconds], floor=self._floor(batch))
        self._record(seconds, step_s)

    def _exchange(self) -> tuple[list[float], float, float]:
        """Seconds a sample of each rank (0: unknown), samples a global batch, seconds a step."""
        import torch

        size, steps = self._world.size, len(self._window)
        mine = torch.zeros(size + 2, dtype=torch.float64)
        mine[self._world.rank] = seconds_a_sample([(step.compute_s, step.samples) for step in self._window]) or 0.0
        mine[size] = sum(step.samples for step in self._window) / steps
        mine[size + 1] = sum(step.total_s for step in self._window) / steps / size
        *seconds, batch, step_s = self._world.allreduce(mine, name="strategy.balance").tolist()
        return seconds, batch, step_s

    def _floor(self, batch: float) -> float:
        # Cutting at whole samples takes up to one from a share: what is above one sample a micro-batch stays above none.
        return max(self._rule.floor / self._world.size, (self._accumulate + 0.5) / max(batch, 1.0))

    def _follow(self, shares: Shares, speeds: list[float], *, floor: float) -> None:
        self._moving = excess(shares, speeds) > (self._rule.rest if self._moving else self._rule.wake)
        if self._moving:
            self._shares = next_shares(shares, speeds, rule=self._rule, floor=floor)

    def _record(self, seconds: list[float], step_s: float) -> None:
        if len(self._history) >= _HISTORY:
            self._history = self._history[::2]
        even = (1.0 / self._world.size,) * self._world.size
        self._history.append(
            {
                "step": self._step,
                "shares": [round(share, 6) for share in self._shares or even],
                "ms_a_sample": [round(1000 * each, 6) for each in seconds],
                "step_ms": round(1000 * step_s, 3),
            }
        )

    def state(self) -> dict[str, Any]:
        shares = list(self._shares) if self._shares is not None else None
        return {"shares": shares, "moving": self._moving, "step": self._step, "history": self._history}

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._step, self._history = int(state["step"]), list(state["history"])
        if state["shares"] is not None and len(state["shares"]) == self._world.size:
            self._shares, self._moving = tuple(state["shares"]), bool(state["moving"])

    def describe(self) -> dict[str, Any]:
        """``history``: a record a look, with the shares in force after it and the times of the steps before it."""
        return {"every": self._every, "shares": list(self._shares or ()), "history": self._history}


def balancer(kind: str, *, every: int, world: World, accumulate: int = 1) -> Even:
    """What ``strategy.balance`` names."""
    return Even() if kind == "none" else Balancer(world, every=every, accumulate=accumulate)


def check_balance(kind: str, *, every: int) -> None:
    """Check the arguments of a strategy.

    Raises:
        ConfigError: an unknown kind, or too few steps to measure in.
    """
    if kind not in ("none", "throughput"):
        raise ConfigError(f"strategy.balance={kind} is not known; use none or throughput")
    if every < _FEWEST_STEPS:
        raise ConfigError(
            f"strategy.balance_every={every} is too few steps to measure a rank; use {_FEWEST_STEPS} or more"
        )
