"""One bit an element with error feedback (Seide et al. 2014, "1-bit stochastic gradient descent", Interspeech)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import GatherMethod, Slot, Wire
from horovod_jobs.strategy.compression.packing import as_bytes, pack, read, unpack


class OneBit(GatherMethod):
    """Each element is sent as its sign, each bucket with the numbers that signs stand for; the rest is kept for later.

    With ``two_means`` a bucket has the mean of its elements that are not negative and that of those that are, which has the
    smallest squared error of all pairs for these signs (Seide et al. 2014, section 3.2; a bucket is what a column is there).
    Without, a sign stands for plus or minus the mean magnitude (Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1), which is
    what ``strategy.compression=sign`` means.

    Args:
        two_means: see above.
        bucket: elements that share the same numbers; 4 or 8 bytes each bucket.
        min_elements: smaller tensors and vectors are summed uncompressed.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: ClassVar[str] = "onebit"
    feedback = True

    def __init__(self, *, two_means: bool = True, bucket: int = 1024, min_elements: int = 1024) -> None:
        super().__init__(min_elements=min_elements)
        if bucket < 8:
            raise ConfigError(f"strategy.compression.bucket={bucket} is too small to save anything; use 8 or more")
        self.two_means, self.bucket = two_means, bucket

    def encode(self, values: Tensor, *, slot: Slot, wire: Wire) -> Tensor:
        missing = -values.numel() % self.bucket
        rows = pad(values, (0, missing)).view(-1, self.bucket)
        counts = values.new_full((len(rows),), self.bucket)
        counts[-1] -= missing
        positive = rows >= 0  # The padding too, which adds nothing to the sums.
        if self.two_means:
            many = positive.sum(1).to(values.dtype)
            many[-1] -= missing
            above = rows.clamp(min=0).sum(1) / many.clamp(min=1)
            below = rows.clamp(max=0).sum(1) / (counts - many).clamp(min=1)
        else:
            above = rows.abs().sum(1) / counts
            below = -above
        bits = pack(positive.view(-1)[: values.numel()].view(torch.uint8), bits=1)
        return as_bytes(above, below, bits) if self.two_means else as_bytes(above, bits)

    def decode(self, payload: Tensor, *, out: Tensor) -> None:
        numel = out.numel()
        buckets = -(-numel // self.bucket)
        above = read(payload, start=0, count=buckets, dtype=torch.float32)
        if not self.two_means:
            self._add(payload[4 * buckets :], above, meaning=(-1.0, 1.0), out=out)
            return
        below = read(payload, start=4 * buckets, count=buckets, dtype=torch.float32)
        self._add(payload[8 * buckets :], above, meaning=(0.0, 1.0), out=out)
        self._add(payload[8 * buckets :], below, meaning=(1.0, 0.0), out=out)

    def _add(self, signs: Tensor, numbers: Tensor, *, meaning: tuple[float, float], out: Tensor) -> None:
        """Add each bucket's number times what its signs mean."""
        numel = out.numel()
        factors = unpack(signs, bits=1, numel=numel, meaning=torch.tensor(meaning, device=out.device))
        whole = numel - numel % self.bucket
        out[:whole].view(-1, self.bucket).addcmul_(
            factors[:whole].view(-1, self.bucket), numbers[: whole // self.bucket, None]
        )
        if whole < numel:
            out[whole:].addcmul_(factors[whole:], numbers[-1])

    def describe(self) -> dict[str, Any]:
        return {"two_means": self.two_means, "bucket": self.bucket, **super().describe()}
