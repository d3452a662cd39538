"""How good a model in training is on the validation split."""

from __future__ import annotations

import torch
from torch import nn

from horovod_jobs.evaluation import evaluate, refuse_non_finite_sums
from horovod_jobs.stages.base import StageContext

_BATCH = 256


def validation(ctx: StageContext, model: nn.Module, *, step: int, device: torch.device) -> dict[str, float]:
    """Collective. ``validation_loss`` (nats) and the task's primary figure, the same on every rank. The model is in evaluation mode.

    Raises:
        NonFiniteError: one of them is not a number.
    """
    split = ctx.data.validation
    assert split is not None, "who has no validation split does not ask"
    sums = evaluate(model, split, ctx.task, world=ctx.world, batch=_BATCH, name="fit.validation", device=device)
    what = f"validation in stage {ctx.name} after step {step}"
    remedy = "lower optimizer.lr or set fit.clip_norm. Nothing was published"
    refuse_non_finite_sums(sums, what=what, remedy=remedy)
    figures, primary = ctx.task.summary(sums), ctx.task.primary
    found = {"validation_loss": float(figures["loss"]), f"validation_{primary}": float(figures[primary])}
    refuse_non_finite_sums(found, what=what, remedy=remedy)  # A task may divide by zero.
    return found
