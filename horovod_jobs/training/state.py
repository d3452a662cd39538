"""What the fit loop remembers: where it is, where the time went, and the random numbers of a step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from horovod_jobs.storage import digest_of


@dataclass
class FitState:
    """Where training is. Plain values: it travels in checkpoints."""

    epoch: int = 0
    batch: int = 0  # global batches of this epoch that are done
    seen: int = 0  # samples of this epoch that are done
    step: int = 0
    best: float | None = None
    best_step: int | None = None
    epochs_since_best: int = 0
    finished: bool = False
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch so far
    history: list[dict[str, float | int]] = field(default_factory=list)


@dataclass
class Timing:
    """Seconds of this rank since the last reading, by what they went into."""

    data: float = 0.0
    compute: float = 0.0
    exchange: float = 0.0
    total: float = 0.0
    steps: int = 0
    samples: int = 0

    def figures(self) -> dict[str, float]:
        steps = max(1, self.steps)
        return {
            "samples_per_s": self.samples / self.total if self.total else 0.0,
            "step_ms": 1000 * self.total / steps,
            "data_ms": 1000 * self.data / steps,
            "compute_ms": 1000 * self.compute / steps,
            "exchange_ms": 1000 * self.exchange / steps,
        }


@lru_cache(maxsize=1)
def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers (dropout, say) are a function of the step and the rank: a resumed run draws what it would have drawn."""
    mixed = int(digest_of([seed, step, rank])[:15], 16)
    if _has_accelerator():
        torch.manual_seed(mixed)
    else:
        torch.default_generator.manual_seed(mixed)  # The same numbers; looking for devices to seed takes 0.1 ms a step.
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
