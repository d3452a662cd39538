"""What to say when a loss is NaN or infinite: which step, which ranks, which samples."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from horovod_jobs.errors import NonFiniteError
from horovod_jobs.stages.base import StageContext
from horovod_jobs.training.state import FitState

_SHOWN = 8


def refuse_non_finite(ctx: StageContext, state: FitState, *, mine: Tensor | None) -> NoReturn:
    """Collective: every rank comes here in the same step. ``mine``: indices of this rank's batch if its loss is not finite.

    Raises:
        NonFiniteError: always.
    """
    indices = [] if mine is None else mine.tolist()
    inputs = ctx.data.train.fetch(torch.tensor(indices, dtype=torch.int64)).inputs
    bad = [index for index, row in zip(indices, inputs, strict=True) if not bool(torch.isfinite(row).all())]
    told = ctx.world.gather_json([indices, bad], name="fit.non_finite")
    ranks = [rank for rank, (part, _) in enumerate(told) if part]
    samples = [index for part, _ in told for index in part]
    broken = [index for _, part in told for index in part]
    ctx.events.emit("non_finite", stage=ctx.name, step=state.step, ranks=ranks, samples=samples)
    shown = ", ".join(map(str, samples[:_SHOWN]))
    if len(samples) > _SHOWN:
        shown += f", ... ({len(samples)} in all, in events.jsonl)"
    if broken:
        shown += f"; the inputs of {', '.join(map(str, broken[:_SHOWN]))} are not finite themselves"
    raise NonFiniteError(
        f"the loss is not finite in stage {ctx.name} at step {state.step} (epoch {state.epoch + 1}) on rank "
        f"{', '.join(map(str, ranks))}, training samples {shown}; lower optimizer.lr, set fit.clip_norm, or look at these "
        "samples. Nothing was published"
    )
