"""Calibration: the ranges of activations, observed data-parallel and reduced so that they equal one process's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import World
from horovod_jobs.data.sharding import epoch_permutation
from horovod_jobs.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from horovod_jobs.data.base import Split


def calibration_indices(split: Split, *, samples: int, seed: int) -> Tensor:
    """``[samples]`` int64: positions in the split chosen by the seed, the same for every number of ranks.

    Raises:
        ConfigError: no samples, or more than the split has.
    """
    if samples < 1:
        raise ConfigError(f"calibration_samples={samples} leaves nothing to observe; use at least 1, such as 1024")
    if samples > len(split):
        raise ConfigError(
            f"calibration_samples={samples}, but the training split has {len(split)}; use at most {len(split)}"
        )
    return epoch_permutation(len(split), seed=seed, epoch=0)[:samples]


def indices_digest(indices: Tensor) -> str:
    """SHA-256 (hex) of the positions as little-endian int64."""
    return hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()


def calibration_batches(indices: Tensor, *, batch: int) -> list[Tensor]:
    """The positions in batches of ``batch``, whatever the number of ranks.

    Raises:
        ConfigError: ``batch`` is not positive.
    """
    if batch < 1:
        raise ConfigError(f"calibration_batch={batch} is not a positive number; use at least 1")
    return list(indices.split(batch))


@torch.no_grad()
def observe(prepared: nn.Module, split: Split, batches: Sequence[Tensor], *, world: World) -> None:
    """Collective. Run this rank's batches through a prepared model and reduce its observers over the ranks.

    Whole batches are dealt out in turn, so every batch is computed exactly as one process computes it, and minimum and
    maximum are exact in any order: the result is equal to the last bit for every number of ranks.

    Raises:
        ConfigError: an observer whose statistics are not a minimum and a maximum.
    """
    with world.agreed("quantization.observe"):
        for indices in batches[world.rank :: world.size]:
            prepared(split.fetch(indices).inputs)
        observers = ranges(prepared)
    reduce_ranges(observers, world=world)


def ranges(prepared: nn.Module) -> dict[str, Any]:
    """The observers of a prepared model by name.

    Raises:
        ConfigError: one of them keeps something other than ``min_val`` and ``max_val``.
    """
    from horovod_jobs.quantization.annotation import MinMaxObserver, PerChannelMinMaxObserver

    found: dict[str, Any] = {}
    for name, module in prepared.named_modules():
        if not hasattr(module, "calculate_qparams"):
            continue
        if type(module) not in (MinMaxObserver, PerChannelMinMaxObserver):
            raise ConfigError(
                f"observer {name} is a {type(module).__name__}, whose statistics cannot be reduced over ranks exactly; "
                "use minimum-maximum observers"
            )
        found[name] = module
    return dict(sorted(found.items()))


def reduce_ranges(observers: dict[str, Any], *, world: World) -> None:
    """Collective. Give every observer the minimum and maximum over ranks; two reductions for all of them together.

    A weight's observer has seen nothing on a rank that had no batch, so it takes the others' range like the rest.

    Raises:
        NonFiniteError: on every rank alike, a range with NaN or infinity.
    """
    sizes = world.gather_json([int(module.min_val.numel()) for module in observers.values()], name="quantization.sizes")
    # Empty on a rank that has observed nothing yet: per-channel ranges then have no size of their own.
    widths = [max(1, *column) for column in zip(*sizes, strict=True)]
    for bound, op, nothing in (("min_val", "min", float("inf")), ("max_val", "max", float("-inf"))):
        packed = torch.cat(
            [_filled(getattr(m, bound), w, nothing) for m, w in zip(observers.values(), widths, strict=True)]
        )
        total = world.allreduce(packed, name=f"quantization.{bound}", op=op)
        for (name, module), part in zip(observers.items(), total.split(widths), strict=True):
            if not bool(part.isfinite().all()):
                raise NonFiniteError(
                    f"the observed range of {name} is not finite ({bound}={part.flatten()[0].item()}); the model gives "
                    "NaN or infinity on the calibration samples, so train it again or give other samples"
                )
            per_channel = getattr(module, "ch_axis", None) is not None
            value: Tensor = getattr(module, bound)
            value.resize_(part.shape if per_channel else ()).copy_(part if per_channel else part[0])


def _filled(values: Tensor, width: int, nothing: float) -> Tensor:
    if values.numel() == 0:
        return torch.full((width,), nothing)
    # A minimum over ranks may pass over NaN; the other infinity wins everywhere.
    return torch.nan_to_num(values.reshape(-1).float(), nan=-nothing, posinf=float("inf"), neginf=float("-inf"))
