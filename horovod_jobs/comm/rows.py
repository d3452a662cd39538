"""Sparse gradients through Horovod: the rows that a rank's batch touched go to all the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from horovod_jobs.comm.staging import to_host
from horovod_jobs.comm.world import Traffic

_INT32_ROWS = 2**31


class RowsSender:
    """In place of Horovod's own way, which sends a row as often as a batch has it, and its number in 8 bytes.

    Here each row travels once a step, summed over the batch, with its number in 4 bytes where that is enough. ``prepare`` and
    ``decompress`` are those of dense gradients, so that half precision and predivision hold for rows too.
    """

    def __init__(self, compressor: Any, *, traffic: Traffic, process_set: Any) -> None:
        self._compressor, self._traffic, self._set = compressor, traffic, process_set

    def __call__(self, parameter: torch.nn.Parameter, name: str) -> tuple[Callable[[], Tensor], None]:
        """Collective. Start the exchange of ``parameter.grad`` ``[N, D]``; what is called when it is waited for gives the sum over ranks.

        Ranks may have touched any number of rows, also none.
        """
        assert parameter.grad is not None
        mine = parameter.grad = parameter.grad.coalesce()
        ranks = self._set.size()
        numbers = mine.indices()[0].to(torch.int32 if mine.shape[0] < _INT32_ROWS else torch.int64)
        numbers = to_host(numbers)
        values, context = self._compressor.prepare(mine.values())
        for sent in (numbers, values):
            self._traffic.count_allgather(sent.nbytes, ranks=ranks)
        of_numbers = hvd.allgather_async(numbers.contiguous(), name=f"{name}.rows", process_set=self._set)
        of_values = hvd.allgather_async(values.contiguous(), name=f"{name}.values", process_set=self._set)

        def finish() -> Tensor:
            rows = hvd.synchronize(of_numbers).to(mine.device).long().unsqueeze(0)
            summed = self._compressor.decompress(hvd.synchronize(of_values), context)
            # Rows of several ranks are added here, by the same order on every rank.
            return torch.sparse_coo_tensor(rows, summed, mine.shape, check_invariants=False).coalesce()

        return finish, None
