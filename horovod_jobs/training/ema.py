"""Exponential moving average of the weights (Polyak & Juditsky 1992): often better than the last, never in the way of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Keeps ``decay * average + (1 - decay) * weight`` of the floating-point state, and copies of the rest."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._model, self._decay = model, decay
        self.average: dict[str, Tensor] = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """After every optimizer step."""
        for key, value in self._model.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1.0 - self._decay)
            else:
                self.average[key].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model wears the average for the time of the body."""
        worn = {key: value.detach().clone() for key, value in self._model.state_dict().items()}
        self._model.load_state_dict(self.average)
        try:
            yield
        finally:
            self._model.load_state_dict(worn)
