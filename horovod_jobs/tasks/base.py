"""What a task is to the training loop and to evaluation."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from horovod_jobs.data.base import Batch


class Task(Protocol):
    """The loss and the metrics of a problem.

    Metrics are sums (float64 tensors) that add up over batches and over ranks; ``summary`` turns the totals into
    figures, so uneven shares of the samples stay exact.
    """

    primary: str
    """The figure of ``summary`` that models are compared by; higher is better."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """One loss a sample, ``[B]``."""
        ...

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cheap sums for the training log."""
        ...

    def evaluation_sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """All sums that ``summary`` needs."""
        ...

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Figures of the summed ``evaluation_sums``."""
        ...
