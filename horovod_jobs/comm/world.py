"""What every other part knows of the world: ranks, collectives and how errors are agreed.

A method whose docstring says "collective" must be reached by every rank. One process is a world of size one.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from horovod_jobs.errors import BY_NAME, JobError, WorldError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
OPS = ("sum", "average", "min", "max", "adasum")


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor: ...


@dataclass
class Traffic:
    """What a rank has handed to collectives for gradients, as the sizes of the tensors it gave them."""

    steps: int = 0
    sent_bytes: int = 0
    ring_bytes: int = (
        0  # what leaves a rank when these collectives run as a ring: more for an all-gather among many ranks
    )

    def count_allreduce(self, size_bytes: int, *, ranks: int) -> None:
        """A ring sends each element twice, but for a rank's own part."""
        if ranks > 1:
            self.sent_bytes += size_bytes
            self.ring_bytes += 2 * (ranks - 1) * size_bytes // ranks

    def count_allgather(self, size_bytes: int, *, ranks: int) -> None:
        """Every rank's part goes to all the others."""
        if ranks > 1:
            self.sent_bytes += size_bytes
            self.ring_bytes += (ranks - 1) * size_bytes

    def summary(self, *, uncompressed_bytes: int, ranks: int) -> dict[str, Any]:
        """For a record (JSON): against all-reduces of ``uncompressed_bytes`` a step. No ratio where nothing is sent."""
        whole = Traffic()
        whole.count_allreduce(self.steps * uncompressed_bytes, ranks=ranks)
        return {
            "bytes_sent": self.sent_bytes,
            "bytes_uncompressed": whole.sent_bytes,
            "compression_ratio": round(whole.sent_bytes / self.sent_bytes, 3) if self.sent_bytes else None,
            "bytes_sent_per_step": round(self.sent_bytes / self.steps) if self.steps else 0,
            "bytes_sent_by_ring": self.ring_bytes,
            "bytes_uncompressed_by_ring": whole.ring_bytes,
        }

    def take(self, other: Traffic) -> None:
        """Count what another has counted, which begins again."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
            setattr(other, name, 0)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def restore(self, counted: dict[str, int]) -> None:
        """Go on from what ``to_json`` gave; nothing where there is nothing."""
        for name, value in counted.items():
            setattr(self, name, int(value))


class GradientExchange(Protocol):
    """An optimizer whose gradients are combined over ranks (see ``World.distribute``)."""

    traffic: Traffic

    def synchronize(self) -> None: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...
    def regroup(self, num_groups: int) -> None: ...
    def close(self) -> None: ...


class World(ABC):
    """Base of the worlds: what can be said with the few primitives that each one implements.

    Attributes: ``rank`` of ``size``; ``local_rank`` of ``local_size`` on this host; ``cross_rank`` (the host's number) of
    ``cross_size`` hosts; ``controller`` is ``none``, ``mpi`` or ``gloo``.

    Where stages run side by side, each has a part of the world (``comm.groups``), in which ranks count from 0 and ``ranks`` are
    their numbers in the whole. A part's hosts are those it has ranks on. ``local_rank`` stays the place among all ranks on the host,
    for it chooses the GPU; ``host_rank`` of ``host_size`` is the place among the part's own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1
    controller: str = "none"
    ranks: tuple[int, ...] = (0,)
    host_rank: int = 0
    host_size: int = 1
    lost: tuple[dict[str, Any], ...] = ()  # rank and host of those that have died and without which the others went on

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # --- primitives -------------------------------------------------------------------------------------------------
    @abstractmethod
    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        """Collective. Start a reduction (one of ``OPS``); ``wait()`` gives a new tensor of the same dtype.

        ``adasum`` (Maleki et al. 2021, arXiv:2006.02924) needs MPI and a power of two of ranks.
        """

    @abstractmethod
    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective. Start to gather tensors of one shape and dtype; ``wait()`` gives ``[size, *tensor.shape]``."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        """Collective. The root's tensor, on every rank; shapes and dtypes must agree."""

    @abstractmethod
    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        """Collective. Every rank's bytes, in the order of ranks."""

    @abstractmethod
    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
        predivide: float = 1.0,
    ) -> GradientExchange:
        """Collective. Wrap an optimizer so that gradients are summed over ranks as they become ready.

        ``accumulate`` backward passes make one exchange; ``num_groups`` 0 lets Horovod fuse as it likes; gradients are divided by
        ``predivide`` before they are sent and their sum is multiplied by it.
        """

    def steady(self, fn: Callable[[], T]) -> T:
        """Collective. What ``fn`` gives where no rank died meanwhile: a world that can lose ranks calls it again without them.

        ``fn`` holds collectives, and doing it twice is doing it once.
        """
        return fn()

    def expect_losses(self, expected: bool) -> None:  # noqa: B027
        """From here on a rank may die and the others go on, where the world can do that; outside ``steady`` all stops even so."""

    @property
    def bereaved(self) -> bool:
        """Whether a rank that this world began with has died."""
        return bool(self.lost)

    def farewell(self) -> None:
        """Collective, before a rank ends by an error: wait for the others, who may have the same one; or for ever."""
        self.barrier(name="goodbye")

    def shutdown(self) -> None:  # noqa: B027  A world of one has nothing to leave.
        """Leave the world in order. Collective."""

    # --- built on them ----------------------------------------------------------------------------------------------
    def allreduce(self, tensor: Tensor, *, name: str, op: str = "sum") -> Tensor:
        """Collective. The sum, average, minimum or maximum over ranks, as a new tensor."""
        return self.allreduce_async(tensor, name=name, op=op).wait()

    def sum_in_order_async(self, tensor: Tensor, *, name: str) -> Handle:
        """Collective. Start a small sum; every rank starts these and its blocking reductions in the same order, which gradients need not.

        That order lets MPI do it at once, where Horovod would take its turn in the next cycle.
        """
        return self.allreduce_async(tensor, name=name)

    def gather_json(self, value: Any, *, name: str) -> list[Any]:
        """Collective. Every rank's JSON value, in the order of ranks."""
        import json

        return [json.loads(item) for item in self.gather_bytes(json.dumps(value).encode(), name=name)]

    def broadcast_json(self, value: Any, *, name: str) -> Any:
        """Collective. Rank 0's JSON value; what the others give is not looked at."""
        return self.gather_json(value if self.is_main else None, name=name)[0]

    def barrier(self, *, name: str) -> None:
        """Collective. Nobody goes on before everybody is here."""
        self.gather_bytes(b"", name=name)

    def main(self, fn: Callable[[], T], *, name: str) -> T:
        """Collective. Run ``fn`` on rank 0 only; every rank gets its JSON result, or its error.

        Raises:
            JobError: of the class that rank 0's ``fn`` raised.
            WorldError: on the other ranks, when ``fn`` failed by something else (rank 0 raises the original).
        """
        result: T | None = None
        error: BaseException | None = None
        if self.is_main:
            try:
                result = fn()
            except Exception as caught:
                error = caught
        told = self.broadcast_json([_describe(error), result if error is None else None], name=name)
        if error is not None:
            raise error
        if told[0] is not None:
            raise _rebuild(told[0], rank=0)
        return result if self.is_main else told[1]  # type: ignore[return-value]

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Collective. Run the body on every rank; if it fails on one, it fails on all.

        The body must not hold collectives that a rank which fails early would miss.

        Raises:
            JobError: of the class of the first failing rank's error, naming the rank where not all failed alike.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        told = self.gather_json(_describe(error), name=f"agreed.{what}")
        if error is not None:
            raise error
        for rank, description in enumerate(told):
            if description is not None:
                raise _rebuild(description, rank=rank)


def _describe(error: BaseException | None) -> dict[str, str] | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, JobError) else "".join(traceback.format_exception(error)[-3:]).strip()
    return {"class": type(error).__name__, "text": text}


def _rebuild(description: dict[str, str], *, rank: int) -> JobError:
    cls = BY_NAME.get(description["class"])
    if cls is None:
        return WorldError(f"rank {rank} failed: {description['text']}; see its log file")
    return cls(description["text"] if rank == 0 else f"rank {rank}: {description['text']}")


class _Done:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class _LocalExchange:
    """The exchange of a world of one: there is nobody to exchange with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.traffic = Traffic()

    def synchronize(self) -> None:
        """Nothing to wait for."""
        self.traffic.steps += 1

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def regroup(self, num_groups: int) -> None:
        """Nothing is exchanged, in whatever groups."""

    def close(self) -> None:
        """Nothing to undo."""


class SingleWorld(World):
    """One process: every collective gives back what it was given."""

    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        return _Done(tensor.clone())

    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        return _Done(tensor.clone()[None])

    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        return tensor.clone()

    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        return [value]

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
        predivide: float = 1.0,
    ) -> GradientExchange:
        return _LocalExchange(optimizer)
