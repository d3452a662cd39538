"""A step's exchange by one of the package's strategies, for ``network``: one matrix, almost no compute, an SGD update."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks._exchange import timed_blocks
from horovod_jobs.comm.connect import connect, take_role
from horovod_jobs.comm.world import World
from horovod_jobs.instantiate import instantiate
from horovod_jobs.strategy.base import Setting

COLUMNS = 1024


def measure(spec: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Steps of each of ``spec['strategies']`` (nodes with ``_target_``) for each size in bytes; all want the same servers.

    A row has the strategy's number, ``bytes``, ``seconds`` by block and ``sent_bytes``, what a rank's links carried one way in a step
    by the strategy's own count, where it counts.
    """
    torch.set_num_threads(1)
    strategies = [instantiate(node, allow=()) for node in spec["strategies"]]
    roles = take_role(servers=getattr(strategies[0], "dedicated_servers", 0))
    if roles is not None and roles.is_server:
        from horovod_jobs.strategy.parameter_server.server import Server
        from horovod_jobs.strategy.parameter_server.stage import Seat

        up, down = roles.wires()
        Server(Seat(up, down, roles.rank, roles.worker_ranks, roles.server_ranks, ())).serve()
        return None
    for strategy in strategies:
        os.environ.update({**getattr(strategy, "preferred_environment", dict)(), **strategy.environment()})
    world = connect(roles)
    rows = [
        {"strategy": number, **_one(world, strategy, size=size, blocks=spec["blocks"])}
        for number, strategy in enumerate(strategies)
        for size in spec["sizes"]
    ]
    rank = world.rank
    world.barrier(name="strategies.end")
    world.shutdown()
    return rows if rank == 0 else None


class _Given(torch.autograd.Function):
    """A loss that has this gradient: hooks run as after any layer, and what is timed is the exchange, not a multiplication."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return matrix.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient, None


def _one(world: World, strategy: Any, *, size: int, blocks: int) -> dict[str, Any]:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(max(1, size // (4 * COLUMNS)), COLUMNS))
    gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(world.rank))
    optimizer = torch.optim.SGD([matrix], lr=1e-6)
    updater = strategy.bind(optimizer, [("matrix", matrix)], Setting(world, total_steps=1000, steps_per_epoch=1000))
    before = matrix.detach().clone()

    def call() -> None:
        updater.zero_grad()
        _Given.apply(matrix, gradient).backward()
        updater.synchronize()
        updater.step()
        updater.settle()

    def slowest(value: float) -> float:
        return float(world.allreduce(torch.tensor(value, dtype=torch.float64), name="bench.slowest", op="max"))

    seconds = timed_blocks(call, blocks=blocks, slowest=slowest, meet=lambda: world.barrier(name="bench.meet"))
    if torch.equal(before, matrix):
        raise RuntimeError(f"{type(strategy).__name__} left the parameters as they were")
    updater.close()
    return {"bytes": matrix.nbytes, "seconds": seconds, "sent_bytes": _sent_bytes(updater.describe())}


def _sent_bytes(told: Mapping[str, Any]) -> float | None:
    """What leaves a rank in a step where the collectives run as rings, by the strategy's own count."""
    if not told.get("bytes_sent"):
        return None
    steps = told["bytes_sent"] / told["bytes_sent_per_step"]
    return float(told["bytes_sent_by_ring"] / steps)
