"""Training steps over hosts for ``scale_model``: alone, to know when each gradient is ready, and with the exchange."""

from __future__ import annotations

import os
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horovod_jobs.comm.connect import connect
from horovod_jobs.comm.world import World
from horovod_jobs.models.resnet import ResNet
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.base import Setting

Batch = tuple[Tensor, Tensor]
STRATEGY = Allreduce(tune=False)


def _mlp(*sizes: int) -> nn.Module:
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def _work(name: str) -> tuple[nn.Module, Batch]:
    """A model and one rank's synthetic batch: much to exchange for its compute, something between, and little."""
    torch.manual_seed(0)
    if name == "wide MLP":
        return _mlp(784, 1024, 1024, 1024), (torch.randn(128, 1, 28, 28), torch.randint(10, (128,)))
    if name == "deep MLP":
        return _mlp(784, *[448] * 6), (torch.randn(512, 1, 28, 28), torch.randint(10, (512,)))
    if name == "ResNet-20":
        model = ResNet(num_classes=10, input_shape=(3, 32, 32), depth=20)
        return model, (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))
    raise ValueError(f"work {name!r} is not known")


WORKS = ("wide MLP", "deep MLP", "ResNet-20")


def measure(spec: dict[str, Any]) -> list[dict[str, Any]] | None:
    """For each work: the step alone (all ranks at once, nothing exchanged), and ``spec['steps']`` steps with the exchange."""
    torch.set_num_threads(1)
    os.environ.update(STRATEGY.environment())
    world = connect()
    rows = [_one(world, name, steps=spec["steps"]) for name in spec["works"]]
    rank = world.rank
    world.barrier(name="steps.end")
    world.shutdown()
    return rows if rank == 0 else None


def _one(world: World, name: str, *, steps: int) -> dict[str, Any]:
    model, batch = _work(name)
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    alone = _alone(world, model, optimizer, batch, steps=max(steps, 5))
    updater = STRATEGY.bind(optimizer, named, Setting(world))
    seconds = []
    for number in range(steps + 2):
        world.barrier(name="steps.meet")
        start = time.perf_counter()
        updater.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        updater.synchronize()
        updater.step()
        took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        slowest = float(world.allreduce(took, name="steps.slowest", op="max"))
        if number >= 2:
            seconds.append(slowest)
    updater.close()
    return {"work": name, "seconds": seconds, **alone}


def _alone(
    world: World, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, *, steps: int
) -> dict[str, Any]:
    """Medians over steps, of the slowest rank: seconds of the parts of a step, and when each gradient is ready."""
    marks: list[float] = []
    parameters = list(model.parameters())
    order: list[int] = []

    def mark(index: int) -> None:
        order.append(index)
        marks.append(time.perf_counter())

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: mark(index))
        for index, parameter in enumerate(parameters)
    ]
    found: list[Tensor] = []
    for number in range(steps + 1):
        world.barrier(name="alone.meet")
        marks.clear()
        order.clear()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        times = [forward - start, backward - start, end - start, *[moment - start for moment in marks]]
        slowest = world.allreduce(torch.tensor(times, dtype=torch.float64), name="alone.slowest", op="max")
        if number:
            found.append(slowest)
    for hook in hooks:
        hook.remove()
    medians = [statistics.median(column) for column in torch.stack(found).T.tolist()]
    ready = [[parameters[index].nbytes, moment] for index, moment in zip(order, medians[3:], strict=True)]
    return {"forward_s": medians[0], "backward_end_s": medians[1], "total_s": medians[2], "ready": ready}
