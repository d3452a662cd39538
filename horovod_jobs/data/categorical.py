"""Samples made of categorical fields: every sample is a row of whole numbers, the ids of its values.

Id 0 of a field means "none": no value, or a value that the training part does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from horovod_jobs.data.augment import uniform_integers
from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError, DataError

_STEPS = 1 << 24  # A share is a whole number of these.


class Field(NamedTuple):
    """One field of a sample: ``size`` ids from 0 (none) on, in ``columns`` columns; more than one where it has several values."""

    name: str
    size: int
    columns: int = 1


class IdSplit:
    """Rows of ids held in memory.

    inputs: ``[N, F]`` int64; targets: ``[N]`` int64; fields: those that the columns belong to, in order.

    Raises:
        DataError: shapes, types or ids that do not fit the fields.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, fields: Sequence[Field]) -> None:
        columns = sum(field.columns for field in fields)
        if inputs.dtype != torch.int64 or inputs.ndim != 2 or inputs.shape[1] != columns:
            raise DataError(
                f"inputs are {inputs.dtype} of shape {list(inputs.shape)}; the fields have {columns} columns, so give "
                f"torch.int64 [N, {columns}]"
            )
        if targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
            raise DataError(
                f"targets are {targets.dtype} of shape {list(targets.shape)} for {len(inputs)} samples; give one whole "
                "number a sample"
            )
        sizes = torch.tensor([field.size for field in fields for _ in range(field.columns)])
        if len(inputs) and bool(((inputs < 0) | (inputs >= sizes)).any()):
            row, column = ((inputs < 0) | (inputs >= sizes)).nonzero()[0].tolist()
            raise DataError(
                f"sample {row} has id {inputs[row, column].item()} in column {column}, whose ids go from 0 to "
                f"{sizes[column].item() - 1}; give its field a larger size"
            )
        self._inputs, self._targets = inputs.contiguous(), targets.contiguous()

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def inputs(self) -> Tensor:
        """All ids, ``[N, F]``."""
        return self._inputs

    @property
    def targets(self) -> Tensor:
        """All targets, ``[N]``."""
        return self._targets

    def fetch(self, indices: Tensor) -> Batch:
        """The ids ``[B, F]`` of the samples at ``indices``."""
        return Batch(self._inputs.index_select(0, indices), self._targets.index_select(0, indices), indices)


class ForgetIds:
    """Augmentation that sets ids to 0 (none) at random, so that a model also learns what to say of a new user or item.

    shares: of the samples, one for each column from the first on; further columns are left alone. What is forgotten is a
    function of (seed, epoch, sample, column), so it is the same for every number of ranks.

    Raises:
        ConfigError: a share that is not from 0 to 1.
    """

    def __init__(self, *, shares: Sequence[float]) -> None:
        for share in shares:
            if not 0.0 <= share < 1.0:
                raise ConfigError(f"data.augment.shares={list(shares)} is out of range; use shares from 0 on, below 1")
        self._steps = [round(share * _STEPS) for share in shares]

    def __call__(self, inputs: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """A copy of ``inputs`` ``[B, F]`` with ids forgotten; ``indices`` ``[B]`` are the samples' positions.

        Raises:
            DataError: fewer columns than shares.
        """
        if inputs.ndim != 2 or len(self._steps) > inputs.shape[1]:
            raise DataError(
                f"data.augment.shares has {len(self._steps)} numbers, and inputs are of shape {list(inputs.shape)}; give at "
                "most one a column"
            )
        inputs = inputs.clone()
        for column, steps in enumerate(self._steps):
            if steps:
                drawn = uniform_integers(_STEPS, seed=seed, epoch=epoch, indices=indices, stream=column)
                inputs[:, column].masked_fill_(drawn < steps, 0)
        return inputs


def number(codes: Tensor, *, known: Tensor) -> tuple[Tensor, int]:
    """Ids of ``codes`` (int64 from 0 on, 0 = none) and how many there are, 0 included.

    The values of ``codes[known]`` get ids from 1 on, in rising order. Every other value gets 0: what only the test part has
    is not known to a model.
    """
    seen = codes[known].unique()
    seen = seen[seen > 0]
    table = torch.zeros(int(codes.max()) + 1, dtype=torch.int64)
    table[seen] = torch.arange(1, len(seen) + 1)
    return table[codes], len(seen) + 1
