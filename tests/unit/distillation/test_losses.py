"""Losses against their papers' formulas, computed another way (numpy, element by element)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_jobs.data.base import Batch
from horovod_jobs.distillation.losses import (
    HardLabels,
    SoftTargets,
    SquaredLogProbability,
    soft_targets,
    squared_log_probability,
)
from horovod_jobs.distillation.objective import CachedTeacher, Distillation, Distiller, LiveTeacher
from horovod_jobs.errors import ConfigError
from horovod_jobs.tasks.classification import Classification
from horovod_jobs.training.precision import Precision


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


logits = st.integers(1, 5).flatmap(
    lambda rows: st.integers(2, 7).flatmap(
        lambda classes: st.tuples(
            *[
                st.lists(
                    st.lists(st.floats(-8, 8, width=32), min_size=classes, max_size=classes),
                    min_size=rows,
                    max_size=rows,
                )
            ]
            * 2
        )
    )
)


@settings(deadline=None)
@given(pair=logits, temperature=st.floats(0.5, 10))
def test_soft_targets_are_hintons(pair: tuple[list, list], temperature: float) -> None:
    student, teacher = (np.array(side, dtype=np.float64) for side in pair)
    wanted = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        wanted.append(temperature**2 * sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    got = soft_targets(torch.tensor(student), torch.tensor(teacher), temperature=temperature)
    assert got.numpy() == pytest.approx(np.array(wanted), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(pair=logits)
def test_squared_log_probability_is_the_sources(pair: tuple[list, list]) -> None:
    student, teacher = (np.array(side, dtype=np.float64) for side in pair)
    wanted = [((np.log(softmax(t)) - np.log(softmax(s))) ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    got = squared_log_probability(torch.tensor(student), torch.tensor(teacher))
    assert got.numpy() == pytest.approx(np.array(wanted), rel=1e-6, abs=1e-9)


def test_soft_target_gradients_keep_their_size_when_it_is_hot() -> None:
    """Section 2 of the paper: T^2 cancels the 1/T^2 of the gradients; in the limit they are (z - v) / C for centred logits."""
    student = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    soft_targets(student, teacher, temperature=1000.0).sum().backward()
    centred = lambda x: x - x.mean(dim=1, keepdim=True)  # noqa: E731
    assert student.grad is not None
    assert torch.allclose(student.grad, (centred(student) - centred(teacher)).detach() / 10, atol=1e-3)


def batch_of(samples: int) -> Batch:
    generator = torch.Generator().manual_seed(samples)
    return Batch(torch.randn(samples, 6, generator=generator), torch.arange(samples) % 3, torch.arange(samples))


def make(cached: bool) -> Distillation:
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(6, 3), torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout(0.9))
    terms = {
        "soft": SoftTargets(weight=0.7),
        "squared": SquaredLogProbability(weight=0.2),
        "hard": HardLabels(weight=0.1),
    }
    live = LiveTeacher(teacher)
    source = CachedTeacher(live(batch_of(30))) if cached else live
    return Distillation(
        student, source, distiller=Distiller(terms=terms, temperature=3.0), task=Classification(num_classes=3)
    )


def test_the_objective_is_the_weighted_sum_over_samples() -> None:
    objective, batch = make(cached=False), batch_of(7)
    output = objective(batch)
    student, teacher = objective.model(batch.inputs), objective._teacher(batch)
    wanted = (
        0.7 * soft_targets(student, teacher, temperature=3.0)
        + 0.2 * squared_log_probability(student, teacher)
        + 0.1 * torch.nn.functional.cross_entropy(student, batch.targets, reduction="none")
    ).sum()
    assert torch.allclose(output.loss, wanted)
    assert set(output.sums) == {"correct", "soft_loss", "squared_loss", "hard_loss"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cached_and_live_teacher_give_the_same_loss(precision: str) -> None:
    """The student's autocast must not reach into the teacher."""
    whole, rows = batch_of(30), torch.tensor([3, 29, 3, 11])
    part = Batch(whole.inputs[rows], whole.targets[rows], rows)
    live, cached = make(cached=False), make(cached=True)  # The cache is filled before the training, without autocast.
    with Precision(precision, device=torch.device("cpu")).autocast():
        assert torch.allclose(live(part).loss, cached(part).loss, atol=1e-6)


def test_the_teacher_is_frozen_in_eval_mode_and_not_part_of_the_module() -> None:
    objective = make(cached=False)
    objective.train()
    batch = batch_of(4)
    assert torch.equal(objective._teacher(batch), objective._teacher(batch)), "dropout is off"
    objective(batch).loss.backward()
    assert [name for name, _ in objective.named_parameters()] == ["model.weight", "model.bias"]
    assert all(parameter.grad is None for parameter in objective._teacher._model.parameters())


def test_an_empty_share_gives_zero_and_the_same_names() -> None:
    objective = make(cached=True)
    output = objective(batch_of(0))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert list(output.sums) == list(objective(batch_of(3)).sums)
    assert float(objective.model.weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": {}}, "has no term with a weight"),
        ({"terms": {"soft": SoftTargets(weight=0)}}, "has no term with a weight"),
        ({"terms": {"soft": SoftTargets()}, "temperature": 0}, "temperature=0 is not positive"),
    ],
)
def test_bad_distillers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distiller(**arguments)
