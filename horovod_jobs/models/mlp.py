"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from horovod_jobs.errors import ConfigError


class Mlp(nn.Module):
    """Linear-ReLU-dropout layers of the widths in ``hidden``, then one linear layer.

    ``hidden=[]`` is softmax regression.

    Input ``[B, ...]`` of ``input_shape``, output logits ``[B, num_classes]``.

    Raises:
        ConfigError: a width below 1.
    """

    def __init__(
        self, *, num_classes: int, input_shape: Sequence[int], hidden: Sequence[int] = (256, 128), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ConfigError(f"hidden={list(hidden)} has a width below 1; use whole numbers from 1 on")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``."""
        logits: Tensor = self.classifier(self.layers(inputs))
        return logits
