"""bfloat16: the upper half of a float32. Horovod has no bfloat16 on this torch, so bytes travel by all-gather and are summed here."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from horovod_jobs.strategy.compression.base import GatherMethod, Slot, Wire
from horovod_jobs.strategy.compression.packing import as_bytes


class Bf16(GatherMethod):
    """Each rank's gradient is rounded to bfloat16 once; the sum is taken in float32, in the order of ranks.

    An all-gather moves ``(N - 1) * 2`` bytes an element out of a rank, fp16 by a ring ``4 * (N - 1) / N``: the same for 2 ranks,
    twice as much for 4.

    Args:
        min_elements: smaller tensors and vectors are summed uncompressed.
    """

    name: ClassVar[str] = "bf16"
    exact = True

    def __init__(self, *, min_elements: int = 1024) -> None:
        super().__init__(min_elements=min_elements)

    def encode(self, values: Tensor, *, slot: Slot, wire: Wire) -> Tensor:
        return as_bytes(values.to(torch.bfloat16))

    def decode(self, payload: Tensor, *, out: Tensor) -> None:
        out += payload.view(torch.bfloat16)
