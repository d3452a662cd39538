"""Mixed worlds: who agrees that there is one, and what Horovod is given then. There is no GPU here: the copy to the host is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import horovod.torch.optimizer as of_horovod
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.comm import rows, staging
from horovod_jobs.comm.world import World
from horovod_jobs.stages import train
from tests.support import ALLREDUCE, context, fit_config, train_stage


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_mixed", False)


@pytest.mark.parametrize(
    ("has_gpu", "mixed"),
    [(lambda rank: rank == 0, True), (lambda rank: rank > 0, True), (lambda rank: True, False), (lambda rank: False, False)],
    ids=["first", "others", "all", "none"],
)  # fmt: skip
def test_all_ranks_agree_whether_some_have_a_gpu_and_others_none(
    world: World, monkeypatch: pytest.MonkeyPatch, has_gpu: Callable[[int], bool], mixed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu(world.rank))
    assert staging.agree() is mixed


def test_a_world_without_gpus_copies_nothing(world: World) -> None:
    assert staging.agree() is torch.cuda.is_available() is False
    tensor = torch.ones(3)
    assert staging.to_host(tensor) is tensor


class Copies:
    """Stands for the copy to the host, and knows its own copies by their memory."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []  # kept, so that no other tensor gets their memory

    def __call__(self, tensor: Tensor) -> Tensor:
        self.made.append(tensor.clone(memory_format=torch.preserve_format))
        return self.made[-1]

    def knows(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == copy.data_ptr() for copy in self.made)


@pytest.mark.parametrize(
    "strategy",
    [{}, {"compression": "fp16"}, {"num_groups": 2}, {"predivide": 4.0}],
    ids=["plain", "fp16", "grouped", "predivide"],
)
def test_horovod_is_given_copies_and_training_is_what_it_was(
    world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any]
) -> None:
    """One rank alone copies, as the one with the GPU does; the other gives its tensors as they are."""
    plain = run(world, shared_dir / "plain", strategy)
    copies = Copies()
    given: list[bool] = []
    if world.rank == 0:
        for module in (staging, rows):
            monkeypatch.setattr(module, "to_host", copies)

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(tensor: Any, *args: Any, **rest: Any) -> Any:
            given.extend(copies.knows(each) for each in (tensor if isinstance(tensor, list | tuple) else [tensor]))
            return real(tensor, *args, **rest)

        monkeypatch.setattr(module, name, call)

    watch(of_horovod, "allreduce_async_")
    watch(of_horovod, "grouped_allreduce_async_")
    watch(hvd, "allreduce_async")
    watch(hvd, "broadcast")
    staged = run(world, shared_dir / "staged", strategy)
    assert len(given) > 40  # The gradients of every step, and what a stage exchanges at its ends.
    assert all(given) if world.rank == 0 else not any(given)
    assert all(torch.allclose(plain[key], staged[key], atol=0 if world.size == 2 else 1e-5) for key in plain)


def run(world: World, directory: Path, strategy: dict[str, Any]) -> dict[str, Tensor]:
    ctx = context(directory, world=world)
    train.run(ctx, train_stage(strategy={**ALLREDUCE, "tune": False, **strategy}, fit=fit_config(max_steps=6)))
    return load_file(ctx.staging / "model.safetensors")
