"""What to say when a loss is NaN or infinite: which step, which ranks, which samples; and when weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from horovod_jobs.errors import ConfigError, NonFiniteError
from horovod_jobs.stages.base import StageContext
from horovod_jobs.training.state import FitState

_SHOWN = 8
_PROBE = 64  # training samples that a model is tried on where nothing validates it


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


def non_finite_names(module: nn.Module) -> set[str]:
    """Parameters and buffers with a NaN or an infinity. A mask has one by design: see ``refuse_bad_weights``."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {name for name, value in state if not bool(torch.isfinite(value).all())}


def refuse_bad_weights(ctx: StageContext, state: FitState, objective: Any, *, before: set[str]) -> None:
    """Collective, before anything is published: a loss that is looked at before each update says nothing of the last update.

    ``before``: what was not finite in the untrained model, a mask say. Where there is no validation split, which would have
    told, the model is tried on the first training samples too: finite weights may still be too large to multiply.

    Raises:
        NonFiniteError: on every rank, where a rank has such weights.
    """
    bad = sorted(non_finite_names(objective) - before)
    if not bad and ctx.data.validation is None and not _gives_a_loss(ctx, objective):
        bad = [f"loss of the first {_PROBE} training samples"]
    told = ctx.world.gather_json(bad, name="fit.bad_weights")
    ranks = [rank for rank, names in enumerate(told) if names]
    if not ranks:
        return
    names = told[ranks[0]]
    shown = ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
    ctx.events.emit("non_finite", stage=ctx.name, step=state.step, ranks=ranks, weights=names)
    raise NonFiniteError(
        f"the model is not finite in stage {ctx.name} after its last step, {state.step}, on rank "
        f"{', '.join(map(str, ranks))} ({shown}); lower optimizer.lr or set fit.clip_norm. Nothing was published"
    )


def _gives_a_loss(ctx: StageContext, objective: Any) -> bool:
    device = next(objective.parameters()).device
    objective.eval()
    with torch.no_grad():
        batch = ctx.data.train.fetch(torch.arange(min(_PROBE, len(ctx.data.train)))).to(device)
        return bool(torch.isfinite(objective(batch).loss))


@contextmanager
def told_of_overflow(ctx: StageContext, state: FitState, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around an optimizer's step. A number that float32 cannot hold is an error of torch's without a name; all ranks have the same.

    Raises:
        ConfigError: a learning rate, or another number of the optimizer's, is too large.
    """
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        rates = ", ".join(f"{group['lr']:.3g}" for group in optimizer.param_groups)
        raise ConfigError(
            f"the optimizer's step overflows float32 in stage {ctx.name} at step {state.step} with the learning rate "
            f"{rates}; lower optimizer.lr, 0.1 say. Nothing was published"
        ) from error
