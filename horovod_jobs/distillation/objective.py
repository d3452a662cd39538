"""The objective of a distillation: weighted terms, and the teacher that feeds them, live or from its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from horovod_jobs.data.base import Batch
from horovod_jobs.distillation.losses import Term, Views
from horovod_jobs.errors import ConfigError
from horovod_jobs.tasks.base import Task
from horovod_jobs.training.objective import ObjectiveOutput


class Distiller:
    """What a ``distill`` stage is told: the terms, their temperature, and whether the teacher is run once or at every step.

    Args:
        terms: name -> term (see ``distillation.losses``).
        temperature: for the terms that have none of their own.
        cache: compute the teacher's outputs over the training split once and read them back by sample.

    Raises:
        ConfigError: no terms, all weights zero, or a temperature that is not positive.
    """

    def __init__(self, *, terms: Mapping[str, Any], temperature: float = 4.0, cache: bool = False) -> None:
        if not terms or not any(term.weight > 0 for term in terms.values()):
            raise ConfigError(
                f"distiller.terms={dict(terms)} has no term with a weight; give at least one, soft targets say"
            )
        if temperature <= 0:
            raise ConfigError(f"distiller.temperature={temperature} is not positive; use 1 to 20")
        self.temperature, self.cache = temperature, cache
        self.terms: dict[str, Term] = dict(terms)
        for term in self.terms.values():
            if getattr(term, "temperature", 0.0) is None:
                term.temperature = temperature  # type: ignore[attr-defined]


class Teacher(Protocol):
    """Gives the teacher's outputs for a batch, without a graph."""

    def __call__(self, batch: Batch) -> Tensor: ...


class LiveTeacher:
    """Runs the frozen teacher on the batch as it is, augmentation included, in full precision like its cache."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        # The student's autocast would reach into the teacher, whose cached outputs are those of float32.
        with torch.autocast(batch.inputs.device.type, enabled=False):
            outputs: Tensor = self._model(batch.inputs)
        return outputs


class CachedTeacher:
    """Reads the teacher's outputs [N, C] back by the samples' positions in the training split."""

    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs

    def __call__(self, batch: Batch) -> Tensor:
        return self._outputs.index_select(0, batch.indices.to(self._outputs.device)).to(batch.inputs.device)


class Distillation(nn.Module):
    """Sum of weighted terms; ``model`` is the student. The teacher is no part of the module: it is not trained or saved."""

    def __init__(self, student: nn.Module, teacher: Teacher, *, distiller: Distiller, task: Task) -> None:
        super().__init__()
        self.model = student
        self._teacher = teacher
        self._terms = distiller.terms
        self._task = task

    def forward(self, batch: Batch) -> ObjectiveOutput:
        outputs = self.model(batch.inputs)
        views = Views(outputs, self._teacher(batch), batch, self._task)
        loss = outputs.new_zeros((), dtype=torch.float32)
        sums = {}
        for name, term in self._terms.items():
            part = term(views).sum()
            loss = loss + term.weight * part
            sums[f"{name}_loss"] = part.detach()
        return ObjectiveOutput(loss, {**self._task.sums(outputs.detach(), batch), **sums})
