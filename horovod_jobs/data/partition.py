"""Holding samples out by a seeded permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError


def hold_out(n: int, *, samples: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Positions that stay and positions held out, both ``int64`` in rising order, without overlap.

    Raises:
        ConfigError: ``samples`` is negative or leaves nothing; the message calls it ``name``.
    """
    if not 0 <= samples < n:
        raise ConfigError(f"{name}={samples} does not leave any of the {n} samples to train on; use 0 to {n - 1}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[samples:].sort().values, order[:samples].sort().values
