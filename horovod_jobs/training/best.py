"""The best weights so far by the validation split: kept beside the checkpoints, and published where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from horovod_jobs.stages.base import StageContext
from horovod_jobs.training.checkpoint import Checkpoints
from horovod_jobs.training.state import FitState


class Best:
    """``published``: the stage publishes them, not the last ones."""

    def __init__(self, ctx: StageContext, checkpoints: Checkpoints, *, published: bool) -> None:
        self._ctx, self._checkpoints, self._published = ctx, checkpoints, published

    def note(self, state: FitState, value: float, *, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Collective. A validation gave ``value`` of the primary figure; more is better. Early stopping counts from here."""
        if state.best is not None and value <= state.best:
            state.epochs_since_best += 1
            return
        state.best, state.best_step, state.epochs_since_best = value, state.step, 0
        # Kept whatever is published: a job that is cut off leaves its best weights beside its last.
        best = {key: tensor.cpu() for key, tensor in weights().items()}
        self._ctx.world.steady(lambda: self._checkpoints.save_best(best, step=state.step))

    def weights(self, state: FitState) -> dict[str, Any] | None:
        """Collective. What is published instead of the last weights; None for those."""
        step = state.best_step
        if not self._published or step is None:
            return None
        best = self._ctx.world.steady(lambda: self._checkpoints.load_best(step))
        if best is None:
            self._forget(state, "the last weights are published")
        return best

    def check(self, state: FitState) -> None:
        """Collective, after a checkpoint was taken back: its best weights may be gone."""
        if self._published and state.best_step is not None and not self._checkpoints.has_best(state.best_step):
            self._forget(state, "the best from here on are published, or the last")

    def _forget(self, state: FitState, instead: str) -> None:
        self._ctx.log.warning(
            "%s: the best weights, those of step %s, are damaged or gone; %s", self._ctx.name, state.best_step, instead
        )
        state.best = state.best_step = None
