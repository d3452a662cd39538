"""Which samples calibrate, and how ranges are reduced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.base import TensorSplit
from horovod_jobs.errors import ConfigError
from horovod_jobs.quantization.annotation import MinMaxObserver, PerChannelMinMaxObserver
from horovod_jobs.quantization.calibration import (
    calibration_batches,
    calibration_indices,
    indices_digest,
    ranges,
    reduce_ranges,
)

SPLIT = TensorSplit(torch.zeros(40, 2), torch.zeros(40))


def test_samples_are_distinct_and_chosen_by_the_seed() -> None:
    chosen = calibration_indices(SPLIT, samples=16, seed=3)
    assert len(set(chosen.tolist())) == 16
    assert torch.equal(chosen, calibration_indices(SPLIT, samples=16, seed=3))
    assert indices_digest(chosen) != indices_digest(calibration_indices(SPLIT, samples=16, seed=4))


@pytest.mark.parametrize(("samples", "message"), [(0, "use at least 1"), (41, "use at most 40")])
def test_samples_that_are_not_there_are_refused(samples: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"calibration_samples={samples}.*{message}"):
        calibration_indices(SPLIT, samples=samples, seed=0)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibration_batch=0"):
        calibration_batches(torch.arange(4), batch=0)


class TwoRanks(SingleWorld):
    """This rank beside one that has observed something else."""

    def __init__(self, other: dict[str, Tensor], sizes: list[int]) -> None:
        self._other, self._sizes = other, sizes

    def allreduce(self, tensor: Tensor, *, name: str, op: str = "sum") -> Tensor:
        return {"min": torch.minimum, "max": torch.maximum}[op](tensor, self._other[op])

    def gather_json(self, value: list[int], *, name: str) -> list[list[int]]:
        return [value, self._sizes]


def test_ranges_are_the_union_over_ranks() -> None:
    per_tensor = MinMaxObserver(dtype=torch.uint8)
    per_tensor(torch.tensor([-1.0, 2.0]))
    per_channel = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.int8)  # Has seen nothing on this rank.
    other = {"min": torch.tensor([0.0, -3.0, -4.0]), "max": torch.tensor([5.0, 3.0, 4.0])}
    reduce_ranges({"a": per_tensor, "b": per_channel}, world=TwoRanks(other, [1, 2]))
    assert (per_tensor.min_val.item(), per_tensor.max_val.item()) == (-1.0, 5.0)
    assert per_tensor.min_val.shape == ()
    assert per_channel.min_val.tolist() == [-3.0, -4.0]
    assert per_channel.max_val.tolist() == [3.0, 4.0]


def test_an_observer_that_cannot_be_reduced_exactly_is_refused() -> None:
    from torchao.quantization.pt2e import HistogramObserver

    with pytest.raises(ConfigError, match="HistogramObserver"):
        ranges(torch.nn.ModuleDict({"activation": HistogramObserver()}))
