"""Which rank reads which sample. Pure arithmetic: the same global batches for every number of ranks.

An epoch is one permutation of the split, cut into global batches. Each global batch is cut into one contiguous share a
rank, and each share into ``accumulate`` micro-batches. Nothing is padded, dropped or repeated, so sums over ranks equal
the sums of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError


def epoch_permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: ``[n]`` int64, a permutation that depends on ``n``, ``seed`` and ``epoch`` only."""
    # A hash, not seed + epoch: otherwise seed 1 would repeat the epochs of seed 0, one later.
    key = hashlib.sha256(f"epoch-permutation:{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)


def num_batches(n: int, *, global_batch: int, drop_last: bool = False) -> int:
    """Global batches in an epoch of ``n`` samples; the last one may be smaller unless it is dropped."""
    _positive(global_batch=global_batch)
    return n // global_batch if drop_last else -(-n // global_batch)


def rank_slice(count: int, *, rank: int, size: int) -> slice:
    """The contiguous share of ``range(count)`` that belongs to ``rank``; shares differ by at most one sample."""
    _check_rank(rank, size)
    return slice(count * rank // size, count * (rank + 1) // size)


def weighted_slice(count: int, *, rank: int, shares: Sequence[float]) -> slice:
    """The contiguous part of ``range(count)`` that ``shares`` (which add up to 1) gives to ``rank``: within one sample of its share."""
    _check_rank(rank, len(shares))
    ends = [round(count * sum(shares[:part])) for part in range(len(shares))] + [count]
    return slice(ends[rank], ends[rank + 1])


def micro_batches(
    global_indices: Tensor, *, rank: int, size: int, accumulate: int, shares: Sequence[float] | None = None
) -> list[Tensor]:
    """This rank's share of a global batch as exactly ``accumulate`` tensors, in order; some may be empty.

    ``shares``: how the batch is divided over ranks; evenly without it.
    """
    _positive(accumulate=accumulate)
    count = len(global_indices)
    mine = (
        rank_slice(count, rank=rank, size=size) if shares is None else weighted_slice(count, rank=rank, shares=shares)
    )
    share = global_indices[mine]
    return [share[rank_slice(len(share), rank=step, size=accumulate)] for step in range(accumulate)]


def evaluation_indices(n: int, *, rank: int, size: int, batch: int) -> list[Tensor]:
    """This rank's contiguous share of ``range(n)`` in batches of at most ``batch``; no batch when it has no sample."""
    _positive(batch=batch)
    share = rank_slice(n, rank=rank, size=size)
    return [torch.arange(start, min(start + batch, share.stop)) for start in range(share.start, share.stop, batch)]


def check_divides(global_batch: int, *, size: int, accumulate: int) -> None:
    """Check that every micro-batch of a full global batch has the same number of samples.

    Raises:
        ConfigError: it does not; the message names the nearest sizes that do.
    """
    _positive(global_batch=global_batch, size=size, accumulate=accumulate)
    unit = size * accumulate
    below = global_batch // unit * unit
    if below != global_batch:
        remedy = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"global_batch={global_batch} does not divide by {size} ranks (x {accumulate} accumulation steps); "
            f"use {remedy}"
        )


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ConfigError(f"rank={rank} is not one of {size} ranks; ranks count from 0 to {size - 1}")


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is not a positive number; use at least 1")
