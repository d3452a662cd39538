"""Stochastic quantization (QSGD: Alistarh et al. 2017, arXiv:1610.02132)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression.base import GatherMethod, Slot, Wire
from horovod_jobs.strategy.compression.packing import as_bytes, pack, read, unpack

_BITS = (2, 4, 8)
_NORMS = ("max", "l2")


class Qsgd(GatherMethod):
    """Each element is rounded at random to one of the levels beside it, so that its expectation is itself.

    ``Q(v_i) = |v| * sign(v_i) * l / s`` with ``s = 2 ** (bits - 1) - 1`` levels and ``l`` either of the integers beside
    ``s * |v_i| / |v|`` (section 3.1), for each bucket of elements with its own norm. ``max`` takes the largest magnitude in place of
    the Euclidean norm, as the paper's experiments do (section 4). Codes have a fixed width here; the paper's Elias coding
    is not done. Unbiased, so nothing is kept for later.

    Args:
        bits: of a code, its sign included: 2, 4 or 8.
        bucket: elements that share a norm; 4 bytes each bucket.
        norm: ``max`` or ``l2``.
        seed: of the rounding, together with the step, the rank and the tensor.
        min_elements: smaller tensors and vectors are summed uncompressed.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: ClassVar[str] = "qsgd"

    def __init__(
        self, *, bits: int = 4, bucket: int = 512, norm: str = "max", seed: int = 0, min_elements: int = 1024
    ) -> None:
        super().__init__(min_elements=min_elements)
        if bits not in _BITS:
            raise ConfigError(f"strategy.compression.bits={bits} does not fill a byte evenly; use 2, 4 or 8")
        if bucket < 8:
            raise ConfigError(f"strategy.compression.bucket={bucket} is too small to save anything; use 8 or more")
        if norm not in _NORMS:
            raise ConfigError(f"strategy.compression.norm={norm} is not known; use one of {', '.join(_NORMS)}")
        self.bits, self.bucket, self.norm, self.seed = bits, bucket, norm, seed
        self.levels = 2 ** (bits - 1) - 1

    def encode(self, values: Tensor, *, slot: Slot, wire: Wire) -> Tensor:
        generator = wire.generator(slot, seed=self.seed, shared=False)
        rows = pad(values, (0, -values.numel() % self.bucket)).view(-1, self.bucket)
        sizes = rows.abs()
        norms = self._norms(sizes)
        exact = sizes.mul_((self.levels / norms)[:, None])
        chance = torch.rand(exact.shape, generator=generator, device=exact.device, dtype=exact.dtype)
        # floor(x + u) is the level above with the probability of the fraction.
        level = exact.add_(chance).floor_().clamp_(0, self.levels).to(torch.uint8)
        codes = level | ((rows < 0).to(torch.uint8) << (self.bits - 1))
        return as_bytes(norms, pack(codes.view(-1)[: values.numel()], bits=self.bits))

    def _norms(self, sizes: Tensor) -> Tensor:
        """A norm for each row of magnitudes. What is sent is at least so large that a level is a normal number: no row is divided by 0."""
        least = self.levels * torch.finfo(sizes.dtype).tiny
        norms = sizes.amax(1).clamp(min=least)
        if self.norm == "l2":  # Of scaled elements: squares of small ones would be 0, of large ones infinite.
            norms = (norms * torch.linalg.vector_norm(sizes / norms[:, None], dim=1)).clamp(min=least)
        return norms

    def decode(self, payload: Tensor, *, out: Tensor) -> None:
        numel = out.numel()
        buckets = -(-numel // self.bucket)
        steps = read(payload, start=0, count=buckets, dtype=torch.float32) / self.levels
        codes = torch.arange(2**self.bits, device=out.device)
        meaning = torch.where(codes > self.levels, -1.0, 1.0) * (codes & self.levels)
        values = unpack(payload[4 * buckets :], bits=self.bits, numel=numel, meaning=meaning)
        values = pad(values, (0, -numel % self.bucket)).view(-1, self.bucket)
        out += values.mul_(steps[:, None]).view(-1)[:numel]

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits, "bucket": self.bucket, "norm": self.norm, "seed": self.seed, **super().describe()}
