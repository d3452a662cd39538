"""The evaluation loop: every sample of a split exactly once, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from horovod_jobs.comm.world import World
from horovod_jobs.data.sharding import evaluation_indices
from horovod_jobs.errors import DataError, NonFiniteError

if TYPE_CHECKING:
    from horovod_jobs.data.base import Batch, Split


class Summed(Protocol):
    """The part of a task that evaluation needs."""

    def evaluation_sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums that add up over batches and ranks."""
        ...


def evaluate(
    predict: Callable[[Tensor], Tensor],
    split: Split,
    task: Summed,
    *,
    world: World,
    batch: int,
    name: str,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Collective. The task's sums over the whole split, the same on every rank, as float64 tensors on the CPU.

    Each rank predicts its contiguous share in batches of at most ``batch``; sums and counts are reduced, never means,
    so shares that differ by one sample stay exact. ``task.summary`` turns the result into figures. ``name`` names the
    collectives.

    Raises:
        DataError: the split has no samples.
    """
    with world.agreed(f"{name}.evaluate"):
        if len(split) == 0:
            raise DataError(f"the split to evaluate ({name}) has 0 samples; choose another split")
        sums = _local_sums(predict, split, task, world=world, batch=batch, device=torch.device(device))
    return reduce_sums(sums, world=world, name=f"{name}.sums")


def reduce_sums(sums: dict[str, Tensor], *, world: World, name: str) -> dict[str, Tensor]:
    """Collective. Tensors of the same names and shapes on every rank, summed over ranks in one reduction of float64."""
    keys = sorted(sums)
    packed = torch.cat([sums[key].detach().to("cpu", torch.float64).reshape(-1) for key in keys])
    total = world.allreduce(packed, name=name)
    parts = total.split([math.prod(sums[key].shape) for key in keys])
    return {key: part.reshape(sums[key].shape) for key, part in zip(keys, parts, strict=True)}


def refuse_non_finite_sums(sums: Mapping[str, Tensor | float], *, what: str, remedy: str) -> None:
    """What a whole split's sums, or figures made of them, must be: numbers. They are the same on every rank, so all raise or none.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    bad = [key for key, value in sums.items() if not bool(torch.isfinite(torch.as_tensor(value)).all())]
    if bad:
        first = torch.as_tensor(sums[bad[0]]).flatten()
        value = first[~torch.isfinite(first)][0].item()
        raise NonFiniteError(f"{what} is not finite ({bad[0]}={value}); {remedy}")


@torch.no_grad()
def _local_sums(
    predict: Callable[[Tensor], Tensor], split: Split, task: Summed, *, world: World, batch: int, device: torch.device
) -> dict[str, Tensor]:
    shares = evaluation_indices(len(split), rank=world.rank, size=world.size, batch=batch)
    totals: dict[str, Tensor] = {}
    # A rank without samples still needs the names and shapes of the sums, which an empty batch has.
    for indices in shares or [torch.empty(0, dtype=torch.int64)]:
        samples = split.fetch(indices).to(device)
        for key, value in task.evaluation_sums(predict(samples.inputs), samples).items():
            totals[key] = totals[key] + value if key in totals else value
    return totals
