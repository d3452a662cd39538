"""Adasum by Horovod against the paper's formula in float64, worked out by recursion over all ranks' gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import World
from horovod_jobs.errors import ConfigError
from horovod_jobs.stages import train
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.base import Setting
from tests.support import ALLREDUCE, blob_data, context, fit_config, train_stage


@pytest.fixture(autouse=True)
def _can(world: World) -> None:
    if world.controller != "mpi" or world.size & (world.size - 1):
        pytest.skip(
            "Adasum needs MPI and a power of two of ranks; what is said otherwise is tested below and in unit/strategy"
        )


def adasum(parts: list[Tensor]) -> Tensor:
    """Maleki et al. 2021, section 3: pairs of neighbours, then pairs of pairs."""
    if len(parts) == 1:
        return parts[0]
    merged = []
    for a, b in zip(parts[::2], parts[1::2], strict=True):
        dot, left, right = float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
        merged.append((1 - dot / (2 * left) if left else 1.0) * a + (1 - dot / (2 * right) if right else 1.0) * b)
    return adasum(merged)


def combined(world: World, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the exchange makes of a gradient by name that each rank gives, as the loop would: divided by the global batch."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(value)) for name, value in mine.items()})
    updater = Allreduce(op="adasum").bind(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Setting(world)
    )
    updater.zero_grad()
    sum((model[name] * mine[name]).sum() for name in mine).backward()  # type: ignore[union-attr]
    updater.synchronize()
    found = {name: parameter.grad.clone() for name, parameter in model.items()}
    updater.step()
    updater.close()
    return found


def everyones(world: World, value: Tensor, name: str) -> list[Tensor]:
    return list(world.allgather_async(value, name=f"test.{name}").wait())


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_each_tensor_is_the_formula(world: World, scale: float) -> None:
    generator = torch.Generator().manual_seed(world.rank)
    mine = {"weight": torch.randn(30, 40, generator=generator) + 0.5, "bias": torch.randn(7, generator=generator)}
    mine = {name: scale * value for name, value in mine.items()}
    got = combined(world, mine)
    for name, value in mine.items():
        wanted = adasum([world.size * part.double() for part in everyones(world, value, name)])
        assert torch.allclose(got[name].double(), wanted, rtol=1e-4, atol=1e-5 * scale)
        assert not torch.allclose(got[name].double(), wanted / world.size, rtol=1e-2), (
            "the scaling is what it is said to be"
        )


def test_parallel_gradients_are_averaged_and_orthogonal_ones_added(world: World) -> None:
    """Local gradients are already divided by the global batch: a rank's own mean is ``size`` times what it gives."""
    direction = torch.arange(1.0, 9.0)
    alike = combined(world, {"x": direction / world.size})["x"]
    assert torch.allclose(alike, direction, rtol=1e-5)
    own = torch.zeros(8)
    own[world.rank] = 3.0
    apart = combined(world, {"x": own / world.size})["x"]
    assert torch.allclose(apart[: world.size], torch.full((world.size,), 3.0))


def test_uneven_shares_of_parallel_gradients_are_the_mean_over_samples(world: World) -> None:
    samples = [1.0 + 2.0 * rank for rank in range(world.size)]
    direction = torch.arange(1.0, 9.0)
    # Each rank's mean over its samples is (rank + 1) * direction.
    mine = (world.rank + 1) * direction * samples[world.rank] / sum(samples)
    wanted = sum((rank + 1) * count for rank, count in enumerate(samples)) / sum(samples) * direction
    assert torch.allclose(combined(world, {"x": mine})["x"], wanted, rtol=1e-5)


def test_a_rank_without_samples_changes_nothing(world: World) -> None:
    mine = torch.arange(1.0, 9.0) * float(world.rank == 0)
    assert torch.allclose(combined(world, {"x": mine})["x"], world.size * torch.arange(1.0, 9.0))


def test_a_stage_trains_by_it_and_ranks_stay_alike(world: World, shared_dir: Path) -> None:
    ctx = context(shared_dir, world=world, data=blob_data(103))
    result = train.run(ctx, train_stage(fit=fit_config(epochs=4), strategy={**ALLREDUCE, "op": "adasum"}))
    history = result.details["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["validation_accuracy"] > 0.8
    assert result.details["exchange"]["compression"] == "none"
    assert result.details["exchange"]["op"] == "adasum"
    assert result.details["exchange"]["compression_ratio"] == 1.0


class TestWhereItCannotBe:
    @pytest.fixture(autouse=True)
    def _can(self, world: World) -> None:
        if world.controller == "mpi" and not world.size & (world.size - 1):
            pytest.skip("it can be here")

    def test_every_rank_says_so(self, world: World) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(ConfigError, match=r"strategy\.op=adasum needs (MPI|a power of two)"):
            Allreduce(op="adasum").bind(
                torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Setting(world)
            )
