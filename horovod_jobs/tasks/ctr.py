"""Click-through rate: how likely a person clicks, from two logits, whose difference is the score."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError, DataError, NonFiniteError

# Scores beyond these are all counted in the outermost bins: a probability of 1e-7 and less from 1 - 1e-7 and more.
_LIMIT = 16.0


class ClickThrough:
    """Binary cross-entropy, and of the evaluation AUC, log loss, accuracy and calibration.

    A model gives logits ``[B, 2]``; the score is the second minus the first, and the probability of a click its sigmoid. Targets
    are 1 for a click and 0 for none.

    auc_bins: the scores from -16 to 16 are counted in so many bins, whose counts add up over batches and ranks; samples
        of one bin count as ties. ``auc_error_bound`` says how far the exact AUC can be away.

    Raises:
        ConfigError: other than two classes, or fewer than 2 bins.
    """

    primary = "auc"

    def __init__(self, num_classes: int = 2, *, auc_bins: int = 65536) -> None:
        if num_classes != 2:
            raise ConfigError(
                f"task=click_through tells clicks from no clicks, and the data set has {num_classes} classes; use a data set "
                "with 2, such as data=movielens, or task=classification"
            )
        if auc_bins < 2:
            raise ConfigError(f"task.auc_bins={auc_bins} cannot rank anything; use 2 or more, 65536 say")
        self._bins = auc_bins

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy of each sample, ``[B]``, in nats, computed in float32 whatever the logits' type.

        Raises:
            DataError: a target other than 0 and 1, or logits that are not ``[B, 2]``.
        """
        # A comparison of values on an accelerator would wait for it in every step.
        self._check(logits, batch, values=logits.device.type == "cpu")
        return F.binary_cross_entropy_with_logits(score(logits), batch.targets.float(), reduction="none")

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``correct``: how many samples of the batch are on their side of probability 1/2."""
        return {"correct": ((score(logits) > 0) == batch.targets.bool()).sum().double()}

    def evaluation_sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (nats), ``correct``, ``predicted`` (sum of probabilities), and by score bin ``[bins]`` clicks and no clicks.

        Raises:
            DataError: a target other than 0 and 1, or logits that are not ``[B, 2]``.
            NonFiniteError: a score that has no bin.
        """
        self._check(logits, batch, values=True)
        scores, clicked = score(logits.detach()), batch.targets.bool()
        if not bool(torch.isfinite(scores).all()):
            at = int(batch.indices[int((~torch.isfinite(scores)).nonzero()[0])])
            raise NonFiniteError(
                f"the model's score of sample {at} is not finite; look at the sample, or train the model anew"
            )
        # In float64, so that a score near the edge of a bin does not depend on how float32 rounds the product.
        bins = ((scores.double() + _LIMIT) * (self._bins / (2 * _LIMIT))).long().clamp_(0, self._bins - 1)
        return {
            "loss": F.binary_cross_entropy_with_logits(scores, batch.targets.float(), reduction="none").double().sum(),
            "correct": ((scores > 0) == clicked).sum().double(),
            "predicted": scores.double().sigmoid().sum(),
            "clicks": torch.bincount(bins[clicked], minlength=self._bins).double(),
            "others": torch.bincount(bins[~clicked], minlength=self._bins).double(),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """``loss`` (log loss, nats), ``auc`` with its ``auc_error_bound`` and ``auc_standard_error``, ``accuracy``, ``calibration``.

        calibration: the mean predicted probability divided by the share of clicks; 1 is best. The standard error is of the
        sample: Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.

        Raises:
            DataError: no sample was counted, or all were clicks, or none.
        """
        clicks, others = (sums[key].sum().item() for key in ("clicks", "others"))
        count = clicks + others
        if not clicks or not others:
            raise DataError(
                f"{clicks:.0f} of the {count:.0f} samples evaluated are clicks, so there is no AUC; "
                "give a split that has clicks and others"
            )
        auc, bound = binned_auc(sums["clicks"], sums["others"])
        return {
            "loss": sums["loss"].item() / count,
            "auc": auc,
            "auc_error_bound": bound,
            "auc_standard_error": auc_standard_error(auc, clicks=clicks, others=others),
            "accuracy": sums["correct"].item() / count,
            "calibration": sums["predicted"].item() / clicks,
            "clicks": int(clicks),
            "count": int(count),
        }

    def _check(self, logits: Tensor, batch: Batch, *, values: bool) -> None:
        targets = batch.targets
        if logits.ndim != 2 or logits.shape[1] != 2:
            raise DataError(
                f"the model's output has shape {list(logits.shape)}, and click-through needs two logits a sample; "
                "use a model with num_classes=2, such as model=wide_deep"
            )
        if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
            raise DataError(
                f"targets are {targets.dtype} of shape {list(targets.shape)} for {logits.shape[0]} samples; "
                "click-through needs 1 for a click and 0 for none"
            )
        if values and len(targets):
            wrong = (targets != 0) & (targets != 1)
            if bool(wrong.any()):
                first = int(wrong.nonzero()[0])
                raise DataError(
                    f"target {targets[first].item()} of sample {int(batch.indices[first])} is neither 0 nor 1; mend the labels"
                )


def score(logits: Tensor) -> Tensor:
    """The log odds of a click ``[B]``, float32, of logits ``[B, 2]``."""
    logits = logits.float()
    return logits[:, 1] - logits[:, 0]


def binned_auc(clicks: Tensor, others: Tensor) -> tuple[float, float]:
    """The area under the ROC curve of counts by bin of rising score ``[bins]`` (float64), and how far off it can be.

    The share of pairs (a click, another sample) that are in the right order, pairs of one bin counting half. Only these can
    be wrong, each by a half at most: the bound is half their share.
    """
    pairs = clicks.sum() * others.sum()
    below = others.cumsum(0) - others
    same = (clicks * others).sum()
    return ((clicks * below).sum() + same / 2).div(pairs).item(), (same / 2 / pairs).item()


def auc_standard_error(auc: float, *, clicks: float, others: float) -> float:
    """Standard error of an AUC of so many samples (Hanley and McNeil 1982, equation 2)."""
    two_clicks, two_others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (clicks - 1) * (two_clicks - auc**2) + (others - 1) * (two_others - auc**2)
    return math.sqrt(max(0.0, variance) / (clicks * others))
