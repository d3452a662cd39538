"""The world that Horovod makes, by MPI or by Gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from horovod_jobs.comm import staging
from horovod_jobs.comm.roles import Roles
from horovod_jobs.comm.rows import RowsSender
from horovod_jobs.comm.world import GradientExchange, Handle, Traffic, World
from horovod_jobs.errors import ConfigError

_OPS = {"sum": hvd.Sum, "average": hvd.Average, "min": hvd.Min, "max": hvd.Max, "adasum": hvd.Adasum}
_COMPRESSION = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}

_DIRECT_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32)


def _wire(tensor: Tensor) -> Tensor:
    """A fresh contiguous tensor that Horovod can send: bf16 travels as fp32, bool as uint8, a scalar as one element."""
    tensor = staging.to_host(tensor)
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    elif tensor.dtype is torch.bool:
        tensor = tensor.to(torch.uint8)
    return tensor.reshape(-1).contiguous() if tensor.dim() == 0 else tensor.contiguous()


class _Pending:
    """A collective whose result has the device and dtype of ``like`` and this shape; its name is for the watchdog."""

    def __init__(self, handle: int, like: Tensor, shape: tuple[int, ...], *, name: str) -> None:
        self._handle, self._like, self._shape, self.name = handle, like, shape, name

    def wait(self) -> Tensor:
        return hvd.synchronize(self._handle).to(self._like.device, self._like.dtype).reshape(self._shape)


class _Direct:
    """A sum by MPI itself under way."""

    def __init__(self, request: Any, total: Tensor, like: Tensor, *, name: str) -> None:
        self._request, self._total, self._like, self.name = request, total, like, name

    def wait(self) -> Tensor:
        self._request.Wait()
        return self._total.to(self._like.device)


def _direct_channel(controller: str, roles: Roles | None) -> Any:
    """An MPI communicator for small blocking reductions, or None.

    Horovod answers in a cycle of its background threads, which synchronised batch norm would pay twice a layer; MPI itself takes
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
    if not int(everywhere):
        return None
    return (MPI.COMM_WORLD if roles is None else roles.workers).Dup()


class HorovodWorld(World):
    """Ranks joined by ``hvd.init()``, which ``connect`` has called. A part of them is ``comm.groups.Part``."""

    _DIRECT_BYTES = 65536

    def __init__(self, controller: str, roles: Roles | None = None) -> None:
        self.controller, self.roles = controller, roles
        self._direct = _direct_channel(controller, roles)
        staging.agree()
        self._set = hvd.global_process_set
        self.rank, self.size = hvd.rank(), hvd.size()
        self.ranks = tuple(range(self.size))
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.host_rank, self.host_size = self.local_rank, self.local_size
        self.cross_rank, self.cross_size = hvd.cross_rank(), hvd.cross_size()

    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        handle = hvd.allreduce_async(_wire(tensor), name=name, op=_OPS[op], process_set=self._set)
        return _Pending(handle, tensor, tuple(tensor.shape), name=name)

    def sum_in_order_async(self, tensor: Tensor, *, name: str) -> Handle:
        if self._direct is None or tensor.dtype not in _DIRECT_DTYPES or tensor.nbytes > self._DIRECT_BYTES:
            return super().sum_in_order_async(tensor, name=name)
        from mpi4py import MPI

        total = tensor.detach().to("cpu", copy=True).contiguous()
        return _Direct(self._direct.Iallreduce(MPI.IN_PLACE, total.numpy(), op=MPI.SUM), total, tensor, name=name)

    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        handle = hvd.allgather_async(_wire(tensor), name=name, process_set=self._set)
        return _Pending(handle, tensor, (self.size, *tensor.shape), name=name)

    def allreduce(self, tensor: Tensor, *, name: str, op: str = "sum") -> Tensor:
        # Whatever the device: where one rank has a GPU and another has none, both must take the same way.
        small = tensor.dtype in _DIRECT_DTYPES and tensor.nbytes <= self._DIRECT_BYTES
        if self._direct is None or not small or op not in ("sum", "min", "max"):
            return super().allreduce(tensor, name=name, op=op)
        from mpi4py import MPI

        result = tensor.detach().to("cpu", copy=True).contiguous()
        self._direct.Allreduce(MPI.IN_PLACE, result.numpy(), op={"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}[op])
        return result.to(tensor.device)

    def broadcast(self, tensor: Tensor, *, name: str, root: int = 0) -> Tensor:
        if tensor.numel() == 0:
            return tensor.clone()
        # Horovod counts the root in the whole world, whatever the process set.
        sent = hvd.broadcast(_wire(tensor), self.ranks[root], name=name, process_set=self._set)
        return sent.to(tensor.device, tensor.dtype).reshape(tensor.shape)

    def gather_bytes(self, value: bytes, *, name: str) -> list[bytes]:
        # Typed buffers only: Horovod's own broadcast_object would pickle.
        length = torch.tensor([len(value)], dtype=torch.int64)
        sizes = hvd.allgather(length, name=f"{name}.sizes", process_set=self._set).tolist()
        payload = torch.frombuffer(bytearray(value) or bytearray(1), dtype=torch.uint8)[: len(value)]
        # A tensor without elements is refused by some back ends, so every rank adds one byte.
        payload = torch.cat([payload, torch.zeros(1, dtype=torch.uint8)])
        joined = hvd.allgather(payload, name=f"{name}.bytes", process_set=self._set).numpy().tobytes()
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
        predivide: float = 1.0,
    ) -> GradientExchange:
        if compression not in _COMPRESSION:
            raise ConfigError(f"strategy.compression={compression} is not known; use one of {', '.join(_COMPRESSION)}")
        return HorovodExchange(
            optimizer,
            list(named_parameters),
            accumulate=accumulate,
            compression=compression,
            num_groups=num_groups,
            predivide=predivide,
            process_set=self._set,
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
        if self.roles is not None:
            self.roles.dismiss()


class _Sender:
    """A Horovod compressor in front of another: what every gradient passes on its way out and back.

    Horovod takes contiguous tensors only, and channels-last weights have other gradients. It divides before the sum for an average
    only, and multiplies after it in the type that was sent; here both are done in the gradient's own type, so that a sum which half
    precision cannot hold comes out right.
    """

    def __init__(self, inner: Any, *, predivide: float, traffic: Traffic, ranks: int) -> None:
        self._inner, self._predivide, self._traffic, self._ranks = inner, predivide, traffic, ranks

    def compress(self, tensor: Tensor) -> Any:
        if tensor.is_sparse:  # Only groups send one this way; by itself it goes through RowsSender.
            raise ConfigError("strategy.num_groups cannot group sparse gradients; use num_groups=0, or sparse=false")
        sent, context = self.prepare(tensor)
        self._traffic.count_allreduce(sent.nbytes, ranks=self._ranks)
        return sent, context

    def prepare(self, tensor: Tensor) -> Any:
        """What is sent for a tensor, and what ``decompress`` needs; not counted."""
        if self._predivide != 1:
            tensor = tensor / self._predivide
        sent, context = self._inner.compress(tensor.contiguous())
        return staging.to_host(sent), (context, tensor.device)

    def decompress(self, tensor: Tensor, context: Any) -> Tensor:
        if tensor.is_sparse:  # RowsSender has done it.
            return tensor
        inner, device = context
        restored: Tensor = self._inner.decompress(tensor.to(device), inner)
        return restored * self._predivide if self._predivide != 1 else restored


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

    name = "gradients"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        *,
        accumulate: int,
        compression: str,
        num_groups: int,
        predivide: float,
        process_set: Any,
    ) -> None:
        self.traffic = Traffic()
        self._trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        sender = _Sender(_COMPRESSION[compression], predivide=predivide, traffic=self.traffic, ranks=process_set.size())
        self._wrapped: Any = hvd.DistributedOptimizer(
            _callable_with_parameters_only(optimizer),
            named_parameters=self._trainable,
            compression=sender,
            backward_passes_per_step=accumulate,
            op=hvd.Sum,
            process_set=process_set,
        )
        self._wrapped._sparse_allreduce_grad_async = RowsSender(sender, traffic=self.traffic, process_set=process_set)
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
        self.traffic.steps += 1

    def step(self) -> None:
        with self._wrapped.skip_synchronize():
            self._wrapped.step()

    def zero_grad(self) -> None:
        # Horovod's own signature takes no set_to_none.
        self._wrapped.zero_grad()

    def close(self) -> None:
        """Let go of the gradient accumulators that Horovod's hooks live on."""
        self._wrapped._grad_accs.clear()


def joined() -> bool:
    """Whether this process is in a world now."""
    return bool(hvd.is_initialized())


def abandon() -> None:
    """Leave a world some of whose ranks are gone; not a collective. ``init_horovod`` may follow."""
    hvd.shutdown()


def init_horovod(*, roles: Roles | None) -> None:
    """Join the ranks that the launcher has started, those that work where there are servers. Collective over them."""
    if roles is None or not roles.server_ranks:
        hvd.init()
    else:
        hvd.init(comm=roles.workers)
