"""What a compression method is, and the wire it speaks over.

A method sees one parameter's gradient at a time, already divided by the global batch, and gives the sum over ranks. What it did not
send it may keep as the *residual* and add to the next gradient: error feedback (Seide et al. 2014; Karimireddy et al. 2019,
arXiv:1901.09847). Every rank decodes the same payloads in the same order, so the sum is the same on every rank to the last bit.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.comm.world import Handle, Traffic, World
from horovod_jobs.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rounds = Generator[Handle, "Tensor", "Tensor"]
"""A method's way through its collectives: it yields each one that it has started, is sent its result, and returns the sum."""


@dataclass
class Slot:
    """One parameter's place in an exchange, and what is kept of it from step to step. A checkpoint holds both dictionaries."""

    name: str
    index: int
    shape: tuple[int, ...]
    device: torch.device
    own: dict[str, Tensor] = field(default_factory=dict)  # this rank's; added up where ranks are gone
    shared: dict[str, Tensor] = field(default_factory=dict)  # the same on every rank
    momentum: float = 0.0  # of the optimizer, where the method takes it over; 0: it does not
    nesterov: bool = False

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as a matrix: outputs by all the rest."""
        rows = self.shape[0] if self.shape else 1
        return rows, self.numel // max(1, rows)


class Wire:
    """The collectives of an exchange, which counts the bytes that this rank hands to them. ``step`` counts exchanges."""

    def __init__(self, world: World, *, steps_per_epoch: int = 1) -> None:
        self.world, self.steps_per_epoch = world, max(1, steps_per_epoch)
        self.traffic = Traffic()

    @property
    def step(self) -> int:
        return self.traffic.steps

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def allreduce(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        """Collective. ``wait()`` gives the reduction."""
        self.traffic.count_allreduce(tensor.nbytes, ranks=self.world.size)
        return self.world.allreduce_async(tensor, name=f"gradient.{name}", op=op)

    def allgather(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective. ``wait()`` gives ``[ranks, *tensor.shape]``."""
        self.traffic.count_allgather(tensor.nbytes, ranks=self.world.size)
        return self.world.allgather_async(tensor, name=f"gradient.{name}")

    def generator(self, slot: Slot, *, seed: int, shared: bool) -> torch.Generator:
        """Random numbers as a function of (seed, step, parameter), and of the rank where they are not shared."""
        import torch

        key = f"{seed}:{self.step}:{slot.index}:{'all' if shared else self.world.rank}"
        mixed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
        # What ranks draw alike is drawn on the host: a GPU draws other numbers from the same seed, and ranks may have either.
        return torch.Generator(device="cpu" if shared else slot.device).manual_seed(mixed)


class Method(ABC):
    """A way to send a gradient in fewer bytes.

    Args of all methods: ``min_elements``: smaller tensors, and vectors (biases, norms), are summed uncompressed, all in one.
    """

    name: ClassVar[str]
    key: ClassVar[str] = "strategy.compression"
    """The key that chooses it."""
    without: ClassVar[str] = "none"
    """The value of that key that leaves it out."""
    feedback: bool = False
    """Whether it keeps a residual in ``slot.own``."""
    exact: bool = False
    """Whether the update is the all-reduce's but for rounding, whatever the number of ranks."""
    corrects_momentum: bool = False
    """Whether it takes over the momentum of ``torch.optim.SGD`` (``slot.momentum``)."""
    clips_locally: bool = False
    """Whether each rank's gradient is clipped before it is compressed, and not the sum after it."""

    def __init__(self, *, min_elements: int) -> None:
        if min_elements < 0:
            raise ConfigError(f"strategy.compression.min_elements={min_elements} is negative; use 0 or more")
        self.min_elements = min_elements

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is compressed."""
        count = 1
        for size in shape:
            count *= size
        return len(shape) >= 2 and count >= max(1, self.min_elements)

    def prepare(self, slot: Slot, wire: Wire) -> None:
        """Before the first step: what the slot keeps."""
        if self.feedback:
            import torch

            slot.own["residual"] = torch.zeros(slot.numel, device=slot.device)
        if slot.momentum:
            import torch

            slot.own["momentum"] = torch.zeros(slot.numel, device=slot.device)

    @abstractmethod
    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        """Collective. From this rank's ``[slot.numel]`` float32 to the sum over ranks, of the same shape; see ``Rounds``."""

    def describe(self) -> dict[str, Any]:
        """The arguments, for the record (JSON)."""
        return {"min_elements": self.min_elements}

    def owed(self, gradient: Tensor, slot: Slot) -> Tensor:
        """The gradient (or with momentum what SGD steps by) and what is left from the steps before, as a new tensor."""
        if not self.feedback:
            return gradient.clone()
        if not slot.momentum:
            return gradient + slot.own["residual"]
        velocity = slot.own["momentum"].mul_(slot.momentum).add_(gradient)
        update = gradient.add(velocity, alpha=slot.momentum) if slot.nesterov else velocity
        return slot.own["residual"] + update


class GatherMethod(Method):
    """A method whose ranks exchange payloads of one size, which every rank decodes in the order of ranks."""

    @abstractmethod
    def encode(self, values: Tensor, *, slot: Slot, wire: Wire) -> Tensor:
        """From ``[n]`` float32 to ``[m]`` uint8; ``m`` is the same on every rank."""

    @abstractmethod
    def decode(self, payload: Tensor, *, out: Tensor) -> None:
        """Add a payload's values to ``out``, ``[n]``."""

    def reduce(self, gradient: Tensor, slot: Slot, wire: Wire) -> Rounds:
        values = self.owed(gradient, slot)
        payload = self.encode(values, slot=slot, wire=wire)
        handle = wire.allgather(payload, name=slot.name)
        if self.feedback:  # While the payload travels.
            self.keep(values, payload, slot)
        gathered = yield handle
        total = gradient.new_zeros(slot.numel)
        for one in gathered:
            self.decode(one, out=total)
        return total

    def keep(self, values: Tensor, payload: Tensor, slot: Slot) -> None:
        """Note what the payload does not tell of ``values``."""
        sent = values.new_zeros(slot.numel)
        self.decode(payload, out=sent)
        slot.own["residual"] = values - sent


def check_ratio(ratio: float) -> None:
    """Refuse a share of the elements that is none.

    Raises:
        ConfigError: not above 0 and at most 1.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(
            f"strategy.compression.ratio={ratio} is not a share of the elements; use more than 0 and at most 1, for instance 0.01"
        )


def share_of(numel: int, ratio: float) -> int:
    """How many of ``numel`` elements a ratio means: at least one."""
    return min(numel, max(1, round(numel * ratio)))
