"""Classification into one of several classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError, DataError


class Classification:
    """Cross-entropy and accuracy over ``num_classes`` classes.

    label_smoothing: the share of each target spread evenly over the classes in the training loss (Szegedy et al. 2015,
        arXiv:1512.00567); the evaluation loss has none.
    top_k: a sample counts for ``top_5`` when its class is among the 5 largest logits. Values that are not below
        ``num_classes`` are left out, because every sample would count.

    Raises:
        ConfigError: a value out of its range.
    """

    primary = "accuracy"

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0, top_k: Sequence[int] = (5,)) -> None:
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes} leaves nothing to tell apart; use at least 2")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing={label_smoothing} is out of range; use 0 or more, below 1")
        if any(k < 1 for k in top_k):
            raise ConfigError(f"top_k={list(top_k)} has a value below 1; use whole numbers such as [5]")
        self._classes, self._label_smoothing = num_classes, label_smoothing
        self._top_k = tuple(sorted({k for k in top_k if k < num_classes}))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each sample, ``[B]``, in nats, computed in float32 whatever the logits' type.

        Raises:
            DataError: a target that is not a class, or logits of another number of classes.
        """
        # A comparison of values on an accelerator would wait for it in every step; the device checks the range itself.
        self._check(logits, batch, values=logits.device.type == "cpu")
        return F.cross_entropy(logits.float(), batch.targets, reduction="none", label_smoothing=self._label_smoothing)

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``correct``: how many samples of the batch have the largest logit at their class."""
        return {"correct": (logits.detach().argmax(1) == batch.targets).sum().double()}

    def evaluation_sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (nats), ``correct``, ``top_k`` for each k, ``count`` and ``confusion`` ``[C, C]``, rows = truth.

        Raises:
            DataError: a target that is not a class, or logits of another number of classes.
        """
        self._check(logits, batch, values=True)
        logits, targets = logits.detach().float(), batch.targets
        predicted = logits.argmax(1)
        cells = torch.bincount(targets * self._classes + predicted, minlength=self._classes**2)
        sums = {
            "loss": F.cross_entropy(logits, targets, reduction="none").double().sum(),
            "correct": (predicted == targets).sum().double(),
            "count": torch.tensor(float(len(targets)), dtype=torch.float64, device=logits.device),
            "confusion": cells.view(self._classes, self._classes).double(),
        }
        for k in self._top_k:
            hits = (logits.topk(k, dim=1).indices == targets.unsqueeze(1)).sum()
            sums[f"top_{k}"] = hits.double()
        return sums

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Accuracies between 0 and 1, the mean loss in nats, and the confusion counts as lists, rows = truth.

        A class without samples has None as its accuracy and is not the worst class.

        Raises:
            DataError: no sample was counted.
        """
        count = sums["count"].item()
        if count == 0:
            raise DataError("no samples were evaluated (count=0); give a split with at least 1 sample")
        confusion = sums["confusion"]
        right, seen = confusion.diagonal().tolist(), confusion.sum(1).tolist()
        per_class = [hits / total if total else None for hits, total in zip(right, seen, strict=True)]
        worst, worst_accuracy = min(
            ((label, share) for label, share in enumerate(per_class) if share is not None), key=lambda pair: pair[1]
        )
        return {
            "loss": sums["loss"].item() / count,
            "accuracy": sums["correct"].item() / count,
            **{f"top_{k}": sums[f"top_{k}"].item() / count for k in self._top_k},
            "per_class_accuracy": list(per_class),
            "worst_class": worst,
            "worst_class_accuracy": worst_accuracy,
            "confusion": [[int(cell) for cell in row] for row in confusion.tolist()],
            "count": int(count),
        }

    def _check(self, logits: Tensor, batch: Batch, *, values: bool) -> None:
        targets = batch.targets
        if logits.ndim != 2 or logits.shape[1] != self._classes:
            raise DataError(
                f"the model's output has shape {list(logits.shape)}, but the task has {self._classes} classes; "
                "use a model and a data set with the same num_classes"
            )
        if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
            raise DataError(
                f"targets are {targets.dtype} of shape {list(targets.shape)} for {logits.shape[0]} samples; "
                "classification needs one whole number a sample"
            )
        if values and len(targets):
            low, high = (bound.item() for bound in targets.aminmax())
            if low < 0 or high >= self._classes:
                wrong = low if low < 0 else high
                at = int(batch.indices[int((targets == wrong).nonzero()[0])])
                raise DataError(
                    f"target {wrong} of sample {at} is not a class from 0 to {self._classes - 1}; "
                    "mend the labels or set num_classes"
                )
