"""PowerSGD: a low-rank gradient by one step of the power method (Vogels et al. 2019, arXiv:1905.13727, algorithm 1)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import Method, Rounds, Slot, Wire


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``[m, r]``, ``r <= m``; where they are dependent, completed by any other direction.

    Householder's QR in place of the paper's Gram-Schmidt, which divides by zero where a gradient has a rank below ``r``.
    """
    return torch.linalg.qr(matrix).Q


class PowerSgd(Method):
    """The gradient as a matrix ``M`` (outputs by the rest) is sent as ``P Q'`` of a rank ``r``; what that leaves out is kept.

    ``P = sum of M Q`` over ranks, made orthonormal; ``Q = sum of M' P``. Both are summed by all-reduce: the bytes do not grow with the
    number of ranks. Ranks keep ``M - P (M' P)'`` of their own gradient.

    Args:
        rank: ``r``. Tensors that ``r`` columns and rows would not make smaller are summed uncompressed.
        warm_start: begin with the last step's ``Q`` (section 3), not with a random one.
        seed: of the first ``Q``, or of each.
        min_elements: smaller tensors and vectors are summed uncompressed.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: ClassVar[str] = "powersgd"
    feedback = True

    def __init__(self, *, rank: int = 2, warm_start: bool = True, seed: int = 0, min_elements: int = 1024) -> None:
        super().__init__(min_elements=min_elements)
        if rank < 1:
            raise ConfigError(f"strategy.compression.rank={rank} is not a rank; use 1 or more")
        self.rank, self.warm_start, self.seed = rank, warm_start, seed

    def takes(self, shape: tuple[int, ...]) -> bool:
        if not super().takes(shape):
            return False
        rows = shape[0]
        columns = 1
        for size in shape[1:]:
            columns *= size
        return (rows + columns) * min(self.rank, rows, columns) < rows * columns

    def prepare(self, slot: Slot, wire: Wire) -> None:
        super().prepare(slot, wire)
        if self.warm_start:
            slot.shared["q"] = self._random(slot, wire)

    def _random(self, slot: Slot, wire: Wire) -> Tensor:
        rows, columns = slot.matrix
        generator = wire.generator(slot, seed=self.seed, shared=True)
        return torch.randn(columns, min(self.rank, rows, columns), generator=generator).to(slot.device)

    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        matrix = self.owed(gradient, slot).view(slot.matrix)
        start = slot.shared["q"] if self.warm_start else self._random(slot, wire)
        basis = orthonormal((yield wire.allreduce(matrix @ start, name=f"{slot.name}.p")))
        mine = matrix.T @ basis
        handle = wire.allreduce(mine, name=f"{slot.name}.q")
        slot.own["residual"] = (matrix - basis @ mine.T).view(-1)
        summed = yield handle
        if self.warm_start:
            slot.shared["q"] = summed
        return (basis @ summed.T).view(-1)

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank, "warm_start": self.warm_start, "seed": self.seed, **super().describe()}
