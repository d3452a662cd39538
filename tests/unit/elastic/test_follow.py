"""A batch that follows the number of ranks, in the fit loop itself: cut and gone on with batches of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from horovod_jobs.comm import member
from horovod_jobs.config import FitConfig
from horovod_jobs.data.base import DataModule
from horovod_jobs.errors import ConfigError, Interrupted
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.elastic import Adjusted, Elastic
from tests.support import blob_data, context, fit_config, train_stage
from tests.unit.training.test_fit import StopAt

SAMPLES = 103


class Batches(Allreduce):
    """All-reduce in a world whose number of ranks makes the batch this large."""

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self._size = size

    def adjust(self, fit: FitConfig, *, global_batch: int, size: int) -> Adjusted:
        return Adjusted(self._size, 1)


class Rates:
    """A schedule that notes where in it every step is."""

    noted: list[float] = []  # noqa: RUF012

    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        self.noted.append(step / total)
        return 1.0


class Seen:
    """An augmentation that notes which samples each epoch has seen."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[int]] = {}

    def __call__(self, inputs: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
        self.epochs.setdefault(epoch, []).extend(indices.tolist())
        return inputs


def part(directory: Path, data: DataModule, *, batch: int, until: int | None, **fit: Any) -> StageResult:
    """Train with batches of this size, to a step or to the end."""
    ctx = context(directory, data=data, stop=StopAt(until) if until is not None else None)
    node = {"_target_": "tests.unit.elastic.test_follow.Batches", "size": batch}
    schedule = {"_target_": "tests.unit.elastic.test_follow.Rates"}
    return train.run(ctx, train_stage(strategy=node, schedule=schedule, fit=fit_config(**fit)))


def test_every_sample_is_seen_once_an_epoch_and_the_schedule_goes_by_samples(tmp_path: Path) -> None:
    seen = Seen()
    data = blob_data(SAMPLES, augment=seen)
    Rates.noted.clear()
    for batch, steps in ((24, 2), (12, 3), (48, 1)):  # 48, 36 and 19 samples: the first epoch's end
        with pytest.raises(Interrupted):
            part(tmp_path, data, batch=batch, until=steps)
    with pytest.raises(Interrupted):
        part(tmp_path, data, batch=10, until=4)
    result = part(tmp_path, data, batch=24, until=None)
    assert {epoch: sorted(indices) for epoch, indices in seen.epochs.items()} == {
        0: list(range(SAMPLES)),
        1: list(range(SAMPLES)),
    }
    assert result.metrics["steps"] == 2 + 3 + 1 + 4 + 3  # 40 samples in fours of ten, 63 left
    assert Rates.noted == sorted(Rates.noted)
    assert Rates.noted[2] == pytest.approx(48 / (2 * SAMPLES), abs=0.05)
    assert Rates.noted[6] == pytest.approx(0.5, abs=0.01)
    assert max(Rates.noted) < 1


def test_the_rate_follows_the_batch_where_it_is_told_to(tmp_path: Path) -> None:
    rates = []
    for number, (batch, reference) in enumerate(((24, None), (48, None), (24, 24), (48, 24))):
        with_reference = {} if reference is None else {"lr_reference_batch": reference}
        result = part(tmp_path / str(number), blob_data(SAMPLES), batch=batch, until=None, epochs=1, **with_reference)
        rates.append(result.details["history"][-1]["lr"])
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.1])


@pytest.mark.parametrize(
    ("strategy", "size", "wanted"),
    [
        (Elastic(ranks=4), 4, Adjusted(24, 1)),
        (Elastic(ranks=4), 2, Adjusted(24, 2)),
        (Elastic(ranks=4), 3, Adjusted(24, 2)),
        (Elastic(ranks=4), 8, Adjusted(24, 1)),
        (Elastic(ranks=4, keep_micro_batch=False), 1, Adjusted(24, 1)),
        (Elastic(ranks=4, batch="follow"), 2, Adjusted(12, 1)),
        (Elastic(ranks=4, batch="follow"), 6, Adjusted(36, 1)),
        (Elastic(ranks=0), 2, Adjusted(24, 1)),
    ],
)
def test_what_depends_on_the_number_of_ranks(
    strategy: Elastic, size: int, wanted: Adjusted, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FitConfig(global_batch=24)
    assert strategy.adjust(fit, global_batch=24, size=size) == Adjusted(24, 1), (
        "without a driver the world stays as it is"
    )
    monkeypatch.setattr(member, "_member", object())
    assert strategy.adjust(fit, global_batch=24, size=size) == wanted


@pytest.mark.parametrize(
    ("fit", "remedy"),
    [
        (FitConfig(batch_per_rank=8), "use fit.global_batch"),
        (FitConfig(sync_batchnorm=False), "fit.sync_batchnorm=false"),
        (FitConfig(accumulate=3), "use 1, and strategy.ranks=6"),
    ],
)
def test_what_would_make_another_artifact_in_another_world_is_refused(fit: FitConfig, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        Elastic(ranks=2).adjust(fit, global_batch=24, size=2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"commit_every_steps": 0}, "commit_every_steps=0"),
        ({"batch": "double"}, "strategy.batch=double"),
        ({"compression": "topk"}, "keeps a part of each gradient on its rank"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Elastic(**arguments)
