"""Random-k sparsification (Stich et al. 2018, arXiv:1809.07599) with indices that all ranks draw alike, so that none travel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from horovod_jobs.strategy.compression.base import Method, Rounds, Slot, Wire, check_ratio, share_of


def drawn(numel: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of ``count`` out of ``numel`` elements, ascending, and how many elements each of them stands for; ``[count]`` both.

    One is drawn of each of ``count`` stretches of (nearly) the same length. Every element of a stretch is as likely as the others,
    which is all that the method's expectation and variance bound ask for; a permutation of all elements would cost ``O(numel)``.
    """
    edges = torch.arange(count + 1, dtype=torch.int64) * numel // count
    lengths = edges.diff()
    # float64: a float32 between 0 and 1 times a length could round up to the length.
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    return edges[:-1] + (places * lengths).long(), lengths


class RandomK(Method):
    """In a step all ranks send the same random elements, which are summed by an all-reduce of values alone.

    With ``feedback`` the other elements are kept for later, and the momentum of ``torch.optim.SGD`` is applied before that, as in
    ``topk.TopK`` with its masking. Without it what is sent is multiplied by ``n / k``: unbiased, with
    ``n / k`` times the variance.

    Args:
        ratio: share of a tensor's elements that is sent in a step.
        feedback: keep what was not sent.
        momentum_correction: see above.
        seed: of the indices, together with the step and the tensor.
        min_elements: smaller tensors and vectors are summed uncompressed.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: ClassVar[str] = "randomk"

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        feedback: bool = True,
        momentum_correction: bool = True,
        seed: int = 0,
        min_elements: int = 1024,
    ) -> None:
        super().__init__(min_elements=min_elements)
        check_ratio(ratio)
        self.ratio, self.feedback, self.seed = ratio, feedback, seed
        self.corrects_momentum = feedback and momentum_correction

    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        values = self.owed(gradient, slot)
        generator = wire.generator(slot, seed=self.seed, shared=True)
        found = drawn(slot.numel, share_of(slot.numel, self.ratio), generator)
        indices, lengths = (one.to(slot.device) for one in found)
        sent = values[indices] if self.feedback else values[indices] * lengths
        handle = wire.allreduce(sent, name=slot.name)
        if self.feedback:
            slot.own["residual"] = values.index_fill_(0, indices, 0.0)
            if slot.momentum:
                slot.own["momentum"].index_fill_(0, indices, 0.0)
        summed = yield handle
        total = gradient.new_zeros(slot.numel)
        total[indices] = summed
        return total

    def describe(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "feedback": self.feedback,
            "momentum_correction": self.corrects_momentum,
            "seed": self.seed,
            **super().describe(),
        }
