"""Learning-rate schedules: ``factor(step, total=..., steps_per_epoch=...)`` multiplies the optimizer's rate. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from horovod_jobs.errors import ConfigError


class Schedule(Protocol):
    """``step`` counts updates from 0 to ``total - 1``."""

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float: ...


def warmup(step: int, *, steps: float, start: float) -> float:
    """Gradual warm-up: from ``start`` to 1 in ``steps`` updates, linearly (Goyal et al. 2017, arXiv:1706.02677, section 2.2)."""
    return 1.0 if step >= steps else start + (1.0 - start) * step / steps


def cosine(step: float, *, total: float, final: float) -> float:
    """From 1 to ``final`` along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""
    progress = min(1.0, step / max(1.0, total))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _check_warmup(epochs: float, start: float) -> None:
    if epochs < 0:
        raise ConfigError(f"schedule.warmup_epochs={epochs} is negative; use 0 or more")
    if not 0 <= start <= 1:
        raise ConfigError(
            f"schedule.warmup_start={start} is not between 0 and 1; use the share of the rate to start from"
        )


@dataclass(frozen=True)
class Constant:
    """The optimizer's rate, after a warm-up."""

    warmup_epochs: float = 0.0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_epochs, self.warmup_start)

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        return warmup(step, steps=self.warmup_epochs * steps_per_epoch, start=self.warmup_start)


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine down to ``final`` times the rate."""

    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_epochs, self.warmup_start)

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        steps = self.warmup_epochs * steps_per_epoch
        if step < steps:
            return warmup(step, steps=steps, start=self.warmup_start)
        return cosine(step - steps, total=total - steps, final=self.final)


@dataclass(frozen=True)
class Step:
    """Multiplied by ``gamma`` at each of the ``milestones`` (epochs), after a warm-up."""

    milestones: Sequence[float] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_epochs, self.warmup_start)

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        passed = sum(step >= milestone * steps_per_epoch for milestone in self.milestones)
        return self.gamma**passed * warmup(step, steps=self.warmup_epochs * steps_per_epoch, start=self.warmup_start)


@dataclass(frozen=True)
class OneCycle:
    """Up from ``start`` to the rate in the first ``peak_at`` of all steps, then down to ``final``, both along cosines.

    Smith & Topin 2018, arXiv:1708.07120, with the cosine shape; momentum is left as it is.
    """

    peak_at: float = 0.3
    start: float = 0.04
    final: float = 0.0001

    def __post_init__(self) -> None:
        if not 0 < self.peak_at < 1:
            raise ConfigError(
                f"schedule.peak_at={self.peak_at} is not between 0 and 1; use the share of steps before the peak"
            )

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        last = max(1, total - 1)
        peak = self.peak_at * last
        if step < peak:
            return 1.0 + self.start - cosine(step, total=peak, final=self.start)
        return cosine(step - peak, total=last - peak, final=self.final)
