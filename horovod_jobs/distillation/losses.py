"""Distillation losses: pure functions on logits, and the terms that a config names.

``student`` and ``teacher`` are logits [B, C]; every function gives one loss a sample, [B], in nats (or nats squared).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError
from horovod_jobs.tasks.base import Task


def soft_targets(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the distributions at temperature T, [B]. Hinton et al. 2015, arXiv:1503.02531, section 2."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def squared_log_probability(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over classes of (log p_teacher - log p_student)^2, [B].

    Logit matching (Ba & Caruana 2014, arXiv:1312.6184) on log-probabilities.
    """
    return (F.log_softmax(teacher, dim=1) - F.log_softmax(student, dim=1)).square().sum(dim=1)


@dataclass(frozen=True)
class Views:
    """What a term may look at: both models' outputs for a batch, and the task."""

    student: Tensor
    teacher: Tensor
    batch: Batch
    task: Task


class Term(Protocol):
    """One weighted part of the loss: ``term(views)`` -> [B]."""

    weight: float

    def __call__(self, views: Views) -> Tensor: ...


def _check_weight(weight: float) -> None:
    if weight < 0:
        raise ConfigError(f"distiller: weight={weight} is negative; use 0 or more")


@dataclass
class SoftTargets:
    """See ``soft_targets``. A ``temperature`` of None takes the distiller's."""

    weight: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(f"distiller: temperature={self.temperature} is not positive; use 1 to 20")

    def __call__(self, views: Views) -> Tensor:
        assert self.temperature is not None, "the distiller fills it in"
        return soft_targets(views.student, views.teacher, temperature=self.temperature)


@dataclass
class SquaredLogProbability:
    """See ``squared_log_probability``."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, views: Views) -> Tensor:
        return squared_log_probability(views.student, views.teacher)


@dataclass
class HardLabels:
    """The task's own loss on the labels."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, views: Views) -> Tensor:
        return views.task.loss(views.student, views.batch)
