"""The world that Horovod makes, by MPI or by Gloo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from horovod_jobs.comm.world import GradientExchange, Handle, World
from horovod_jobs.errors import ConfigError

_OPS = {"sum": hvd.Sum, "average": hvd.Average, "min": hvd.Min, "max": hvd.Max}
_COMPRESSION = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}

_DIRECT_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32)


def _wire(tensor: Tensor) -> Tensor:
    """A fresh contiguous tensor that Horovod can send: bf16 travels as fp32, bool as uint8, a scalar as one element."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    elif tensor.dtype is torch.bool:
        tensor = tensor.to(torch.uint8)
    return tensor.reshape(-1).contiguous() if tensor.dim() == 0 else tensor.contiguous()


class _Pending:
    def __init__(self, handle: int, like: Tensor) -> None:
        self._handle = handle
        self._like = like

    def wait(self) -> Tensor:
        return hvd.synchronize(self._handle).to(self._like.dtype).reshape(self._like.shape)


def _direct_channel(controller: str) -> Any:
    """An MPI communicator for small blocking reductions, or None.

    Horovod answers at its cycle time (about 1 ms), which synchronised batch norm would pay twice a layer; MPI itself takes
    microseconds. All ranks use it or none does.
    """
    if controller != "mpi":
        return None
    try:
        from mpi4py import MPI
    except ImportError:
        found = 0
    else:
        found = int(MPI.Is_initialized() and MPI.Query_thread() == MPI.THREAD_MULTIPLE)
    everywhere = hvd.allreduce(torch.tensor([found], dtype=torch.int32), name="comm.direct", op=hvd.Min)
    return MPI.COMM_WORLD.Dup() if int(everywhere) else None


class HorovodWorld(World):
    """Ranks joined by ``hvd.init()``, which ``connect`` has called."""

    _DIRECT_BYTES = 65536

    def __init__(self, controller: str) -> None:
        self.controller = controller
        self._direct = _direct_channel(controller)
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.cross_rank, self.cross_size = hvd.cross_rank(), hvd.cross_size()

    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        return _Pending(hvd.allreduce_async(_wire(tensor), name=name, op=_OPS[op]), tensor)

    def allreduce(self, tensor: Tensor, *, name: str, op: str = "sum") -> Tensor:
        small = tensor.device.type == "cpu" and tensor.dtype in _DIRECT_DTYPES and tensor.nbytes <= self._DIRECT_BYTES
        if self._direct is None or not small or op not in ("sum", "min", "max"):
            return super().allreduce(tensor, name=name, op=op)
        from mpi4py import MPI

        result = tensor.detach().contiguous().clone()
        self._direct.Allreduce(MPI.IN_PLACE, result.numpy(), op={"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}[op])
        return result

    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        if tensor.numel() == 0:
            return tensor.clone()
        return hvd.broadcast(_wire(tensor), root, name=name).to(tensor.dtype).reshape(tensor.shape)

    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        # Typed buffers only: Horovod's own broadcast_object would pickle.
        sizes = hvd.allgather(torch.tensor([len(value)], dtype=torch.int64), name=f"{name}.sizes").tolist()
        payload = torch.frombuffer(bytearray(value) or bytearray(1), dtype=torch.uint8)[: len(value)]
        # A tensor without elements is refused by some back ends, so every rank adds one byte.
        payload = torch.cat([payload, torch.zeros(1, dtype=torch.uint8)])
        joined = hvd.allgather(payload, name=f"{name}.bytes").numpy().tobytes()
        parts, start = [], 0
        for size in sizes:
            parts.append(joined[start : start + size])
            start += size + 1
        return parts

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
    ) -> GradientExchange:
        if compression not in _COMPRESSION:
            raise ConfigError(f"strategy.compression={compression} is not known; use one of {', '.join(_COMPRESSION)}")
        return HorovodExchange(
            optimizer, list(named_parameters), accumulate=accumulate, compression=compression, num_groups=num_groups
        )

    def shutdown(self) -> None:
        # Every rank must have heard the end of the last collective before the first one leaves: Horovod fails what is still open.
        if self._direct is not None:
            self._direct.Barrier()
            self._direct.Free()
        else:
            with contextlib.suppress(
                HorovodInternalError
            ):  # Who hears of this last one late finds the world gone, which is all right.
                self.barrier(name="comm.shutdown")
        hvd.shutdown()


class _Contiguous:
    """A Horovod compressor in front of another: Horovod takes contiguous tensors only, and channels-last weights have other gradients."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def compress(self, tensor: Tensor) -> Any:
        return self._inner.compress(tensor.contiguous())

    def decompress(self, tensor: Tensor, context: Any) -> Tensor:
        restored: Tensor = self._inner.decompress(tensor, context)
        return restored


def _callable_with_parameters_only(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A twin that shares everything with ``optimizer`` and whose class can be made anew from its parameters.

    Horovod derives a class from the optimizer's and calls it with the parameters alone, which fails where another argument has
    no default, and loses what a constructor notes besides the parameter groups.
    """

    class Twin(type(optimizer)):  # type: ignore[misc]
        def __init__(self, params: Any = None) -> None:
            self.__dict__.update(optimizer.__dict__)

    return Twin()


class HorovodExchange:
    """``hvd.DistributedOptimizer`` around an optimizer, sharing its state and parameter groups.

    Gradients are summed, not averaged: the loop has already divided each by the global batch, so a last partial batch that is
    uneven over ranks is weighted exactly.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
    ) -> None:
        self._trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self._wrapped: Any = hvd.DistributedOptimizer(
            _callable_with_parameters_only(optimizer),
            named_parameters=self._trainable,
            compression=_Contiguous(_COMPRESSION[compression]),
            backward_passes_per_step=accumulate,
            op=hvd.Sum,
        )
        # One state, whoever holds the optimizer: the loop saves and loads the plain one.
        self._wrapped.state = optimizer.state
        self._wrapped.param_groups = optimizer.param_groups
        self.regroup(num_groups)

    def regroup(self, num_groups: int) -> None:
        """Form the groups whose tensors are exchanged together; 0 leaves it to Horovod's cycle. Between steps only.

        ``groups=`` of the constructor does this once, and agrees on the order by a pickle from rank 0. The order of the parameters
        is the same on every rank here, and Horovod's hooks read the groups when they run: so they can be formed anew.
        """
        parameters = [parameter for _, parameter in self._trainable]
        count = min(num_groups, len(parameters))
        groups = [
            tuple(parameters[len(parameters) * i // count : len(parameters) * (i + 1) // count]) for i in range(count)
        ]
        self._wrapped._groups = count or None
        self._wrapped._p_to_group = {parameter: group for group in groups for parameter in group}
        self._wrapped._group_counts = dict.fromkeys(groups, 0)

    def synchronize(self) -> None:
        """Collective. Wait until ``.grad`` of every parameter is the sum over ranks."""
        self._wrapped.synchronize()

    def step(self) -> None:
        with self._wrapped.skip_synchronize():
            self._wrapped.step()

    def zero_grad(self) -> None:
        # Horovod's own signature takes no set_to_none.
        self._wrapped.zero_grad()

    def close(self) -> None:
        """Let go of the gradient accumulators that Horovod's hooks live on."""
        self._wrapped._grad_accs.clear()


def init_horovod(*, launched_by_mpi: bool) -> None:
    """Join the ranks that the launcher has started. Collective."""
    # Read at MPI_Init. Ranks share cores with each other's background threads: without yielding a step takes up to twice as long.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        # Before Horovod, so that MPI starts with the thread level that both can use (THREAD_MULTIPLE).
        if launched_by_mpi:
            import mpi4py.MPI  # noqa: F401
    except ImportError:
        pass  # Horovod starts MPI itself; only the fast path for small reductions is missing.
    hvd.init()
