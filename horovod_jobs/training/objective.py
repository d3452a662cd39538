"""What is minimised. Training, distillation and quantization-aware training differ only in the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from horovod_jobs.data.base import Batch
from horovod_jobs.tasks.base import Task


@dataclass
class ObjectiveOutput:
    """``loss`` is the sum over the batch's samples (a scalar with a graph, in nats); ``sums`` are further additive scalars."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A ``torch.nn.Module`` that holds the model to be published and any parameters of its own (a hint regressor, say).

    The keys of ``sums`` are the same for every batch, an empty one too.
    """

    model: nn.Module

    def __call__(self, batch: Batch) -> ObjectiveOutput: ...


class Supervised(nn.Module):
    """The task's loss on hard labels, or a loss of the user's own.

    Args:
        model: takes ``batch.inputs``.
        task: its ``sums`` are reported while training.
        loss: called as ``loss(outputs, batch)`` -> per-sample losses [B]; None for the task's own.
    """

    def __init__(self, model: nn.Module, task: Task, *, loss: Callable[[Tensor, Batch], Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._loss = loss or task.loss

    def forward(self, batch: Batch) -> ObjectiveOutput:
        outputs = self.model(batch.inputs)
        return ObjectiveOutput(self._loss(outputs, batch).sum(), self._task.sums(outputs.detach(), batch))
