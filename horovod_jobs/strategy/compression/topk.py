"""Top-k with the parts of deep gradient compression (Lin et al. 2018, arXiv:1712.01887)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import GatherMethod, Slot, Wire, check_ratio, share_of
from horovod_jobs.strategy.compression.packing import as_bytes, read

_INDEX_LIMIT = 2**31


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` elements of ``[n]`` that are largest by magnitude, in ascending order, ``[count]`` int64."""
    found = torch.topk(values.abs(), count, sorted=False).indices
    return torch.sort(found).values


class TopK(GatherMethod):
    """Each rank sends its largest elements, with their indices, and keeps the rest for later.

    Momentum correction (section 3.1, equation 4): with ``torch.optim.SGD`` the momentum of the optimizer is applied here, to each
    rank's own gradient before it is added to what is kept, ``u = m u + g; v = v + u``. The optimizer then adds what arrives without
    momentum of its own. With other optimizers ``v = v + g``. Momentum masking (section 3.2): where an element is sent, ``u`` becomes
    zero like ``v``, so that old directions do not go on; elements that are sent in every step then have no momentum left.

    Local clipping (section 3.1): with ``fit.clip_norm`` each rank's gradient is clipped to ``clip_norm / sqrt(ranks)`` before it is
    added to what is kept. It needs the whole gradient's norm, so sending then starts after the backward pass.

    Warm-up (section 3.2): in epoch ``e`` of the first ``warmup_epochs`` the share is ``ratio ** ((e + 1) / (warmup_epochs + 1))``,
    which is the paper's 25 %, 6.25 %, 1.5625 %, 0.4 % for a ratio of 0.1 %.

    Args:
        ratio: share of a tensor's elements that a rank sends in a step.
        warmup_epochs: epochs in which the share comes down to ``ratio``; 0: none.
        momentum_correction: see above.
        momentum_masking: see above.
        min_elements: smaller tensors and vectors are summed uncompressed.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: ClassVar[str] = "topk"
    feedback = True
    clips_locally = True

    def __init__(
        self,
        *,
        ratio: float = 0.01,
        warmup_epochs: int = 4,
        momentum_correction: bool = True,
        momentum_masking: bool = True,
        min_elements: int = 1024,
    ) -> None:
        super().__init__(min_elements=min_elements)
        check_ratio(ratio)
        if warmup_epochs < 0:
            raise ConfigError(f"strategy.compression.warmup_epochs={warmup_epochs} is negative; use 0 or more")
        self.ratio, self.warmup_epochs = ratio, warmup_epochs
        self.corrects_momentum, self.masks = momentum_correction, momentum_masking

    def share(self, epoch: int) -> float:
        """Share of the elements sent in an epoch, counted from 0."""
        left = min(1.0, (epoch + 1) / (self.warmup_epochs + 1))
        return float(self.ratio**left)

    def prepare(self, slot: Slot, wire: Wire) -> None:
        if slot.numel >= _INDEX_LIMIT:
            raise ConfigError(f"{slot.name} has {slot.numel} elements and top-k indexes at most {_INDEX_LIMIT - 1}")
        super().prepare(slot, wire)

    def encode(self, values: Tensor, *, slot: Slot, wire: Wire) -> Tensor:
        indices = largest(values, share_of(slot.numel, self.share(wire.epoch)))
        return as_bytes(indices.to(torch.int32), values[indices])

    def decode(self, payload: Tensor, *, out: Tensor) -> None:
        indices, values = _parts(payload)
        out.index_add_(0, indices, values)

    def keep(self, values: Tensor, payload: Tensor, slot: Slot) -> None:
        indices, _ = _parts(payload)
        slot.own["residual"] = values.index_fill_(0, indices, 0.0)
        if slot.momentum and self.masks:
            slot.own["momentum"].index_fill_(0, indices, 0.0)

    def describe(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "warmup_epochs": self.warmup_epochs,
            "momentum_correction": self.corrects_momentum,
            "momentum_masking": self.masks,
            **super().describe(),
        }


def _parts(payload: Tensor) -> tuple[Tensor, Tensor]:
    count = payload.numel() // 8
    indices = read(payload, start=0, count=count, dtype=torch.int32)
    return indices.long(), read(payload, start=4 * count, count=count, dtype=torch.float32)
