"""Compressed gradients under real ranks: the same on all, near to uncompressed, counted, and exact when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.data.digits import digits
from horovod_jobs.data.sharding import epoch_permutation, micro_batches
from horovod_jobs.errors import Interrupted
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.models.mlp import Mlp
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.strategy.allreduce import Allreduce
from horovod_jobs.strategy.base import Setting
from horovod_jobs.training.checkpoint import Checkpoints
from tests.support import ALLREDUCE, blob_data, context, fit_config, train_stage

_HERE = "horovod_jobs.strategy.compression"
# The small net's tensors have 36 and 432 elements, so all are compressed here that can be.
NODES: dict[str, dict[str, Any]] = {
    "bf16": {"_target_": f"{_HERE}.bf16.Bf16", "min_elements": 1},
    "topk": {"_target_": f"{_HERE}.topk.TopK", "ratio": 0.1, "warmup_epochs": 1, "min_elements": 1},
    "randomk": {"_target_": f"{_HERE}.randomk.RandomK", "ratio": 0.2, "min_elements": 1},
    "onebit": {"_target_": f"{_HERE}.onebit.OneBit", "bucket": 64, "min_elements": 1},
    "sign": {"_target_": f"{_HERE}.onebit.OneBit", "bucket": 64, "two_means": False, "min_elements": 1},
    "qsgd": {"_target_": f"{_HERE}.qsgd.Qsgd", "bucket": 64, "min_elements": 1},
    "powersgd": {"_target_": f"{_HERE}.powersgd.PowerSgd", "rank": 2, "min_elements": 1},
}
KEEP = tuple(name for name in NODES if name not in ("bf16", "qsgd"))
ALL = {"_target_": f"{_HERE}.topk.TopK", "ratio": 1.0, "momentum_masking": False, "min_elements": 1}


class StopAt(StopRequest):
    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def code(self) -> int:
        self._left -= 1
        return 1 if self._left <= 0 else 0


def run(
    directory: Path, world: World, compression: Any, *, stop: StopRequest | None = None, **fit: Any
) -> tuple[dict[str, Tensor], StageResult]:
    ctx = context(directory, world=world, data=blob_data(103), stop=stop)
    strategy = {**ALLREDUCE, "compression": compression, "tune": False}
    result = train.run(ctx, train_stage(fit=fit_config(**fit), strategy=strategy))
    return load_file(ctx.staging / "model.safetensors"), result


def same_everywhere(world: World, tensors: dict[str, Tensor]) -> bool:
    low = {key: world.allreduce(value.double(), name=f"test.{key}.low", op="min") for key, value in tensors.items()}
    high = {key: world.allreduce(value.double(), name=f"test.{key}.high", op="max") for key, value in tensors.items()}
    return all(torch.equal(low[key], high[key]) for key in tensors)


def trained(world: World, compression: Any, *, epochs: int, **setting: Any) -> tuple[nn.Module, Any, float]:
    """An MLP on digits, in this world, without the rest of a stage; its accuracy on the test split."""
    data = digits()
    torch.manual_seed(0)
    model = Mlp(num_classes=10, input_shape=tuple(data.input_shape), hidden=[128])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    per_epoch = -(-len(data.train) // 64)
    updater = Allreduce(compression=compression, tune=False).bind(
        optimizer, model.named_parameters(), Setting(world, steps_per_epoch=per_epoch, **setting)
    )
    for epoch in range(epochs):
        for indices in epoch_permutation(len(data.train), seed=0, epoch=epoch).split(64):
            updater.zero_grad()
            for part in micro_batches(indices, rank=world.rank, size=world.size, accumulate=1, shares=None):
                batch = data.train.fetch(part)
                loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="sum")
                (loss / len(indices)).backward()
            updater.synchronize()
            updater.step()
    updater.close()
    model.eval()
    test = data.test.fetch(torch.arange(len(data.test)))
    with torch.no_grad():
        accuracy = float((model(test.inputs).argmax(1) == test.targets).float().mean())
    return model, updater, accuracy


@pytest.fixture(scope="module")
def plain(world: World) -> float:
    return trained(world, "none", epochs=8)[2]


@pytest.mark.parametrize("name", [*NODES, "fp16"])
def test_digits_are_learnt_nearly_as_well(world: World, plain: float, name: str) -> None:
    model, updater, accuracy = trained(world, name, epochs=8)
    assert plain > 0.93
    # A random element waits ten steps for its turn, of 160.
    assert accuracy > plain - (0.12 if name == "randomk" else 0.03)
    assert same_everywhere(world, dict(model.state_dict()))
    told = updater.describe()
    assert told["compression"] == name
    least = {"fp16": 2, "bf16": 1.9, "topk": 3, "randomk": 8, "onebit": 10, "sign": 10, "qsgd": 5, "powersgd": 5}[name]
    assert told["compression_ratio"] >= least
    assert told["bytes_sent"] < told["bytes_uncompressed"]


@pytest.mark.parametrize("name", NODES)
def test_a_stage_trains_by_it(world: World, shared_dir: Path, name: str) -> None:
    weights, result = run(shared_dir / "a", world, NODES[name], epochs=4)
    _, straight = run(shared_dir / "b", world, "none", epochs=4)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    first, last = (result.details["history"][place]["train_loss"] for place in (0, -1))
    assert last < first
    assert last < straight.details["history"][-1]["train_loss"] + 0.25
    exchange = result.details["exchange"]
    assert exchange["method"]["tensors_compressed"] >= 1
    assert exchange["bytes_uncompressed"] == result.metrics["steps"] * 4 * (36 + 4 + 4 + 4 + 432 + 3)


def test_all_elements_are_the_all_reduce(world: World, shared_dir: Path) -> None:
    wanted, _ = run(shared_dir / "a", world, "none")
    got, _ = run(shared_dir / "b", world, ALL)
    assert all(torch.allclose(got[key].double(), wanted[key].double(), atol=1e-5) for key in wanted)


def test_bf16_is_near(world: World, shared_dir: Path) -> None:
    wanted, _ = run(shared_dir / "a", world, "none")
    got, _ = run(shared_dir / "b", world, NODES["bf16"])
    assert any(not torch.equal(got[key], wanted[key]) for key in wanted), "it really is on"
    assert all(torch.allclose(got[key].double(), wanted[key].double(), atol=0.05) for key in wanted)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_resuming_is_exact(world: World, shared_dir: Path, name: str, settings: dict[str, Any]) -> None:
    whole, straight = run(shared_dir / "a", world, NODES[name], **settings)
    stop = StopAt(7) if world.rank == world.size - 1 else None
    with pytest.raises(Interrupted, match="after step 7 of 10"):
        run(shared_dir / "b", world, NODES[name], stop=stop, **settings)
    resumed, result = run(shared_dir / "b", world, NODES[name], **settings)
    assert result.resumed_from_step == 7
    if (
        world.size == 2
    ):  # Of three numbers Horovod's sums depend on how tensors were packed: the small ones go that way.
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    else:
        assert all(torch.allclose(whole[key].double(), resumed[key].double(), atol=1e-3) for key in whole)
    for key in ("bytes_sent", "bytes_uncompressed"):
        assert result.details["exchange"][key] == straight.details["exchange"][key]


def kept(world: World, directory: Path) -> dict[str, Tensor]:
    """The sum over this world's ranks of what the last checkpoint keeps of each."""
    ctx = context(directory, world=world)
    found = Checkpoints(ctx.work, keep=2, world=world, log=ctx.log).load_last()
    assert found is not None
    total: dict[str, Tensor] = {}
    for state in found[1]:
        for key, value in state.items():
            if key.endswith((".residual", ".momentum")):
                total[key] = total.get(key, torch.zeros_like(value)) + value
    return {key: world.allreduce(value, name=f"test.kept.{key}") for key, value in total.items()}


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_a_smaller_world_owes_what_the_larger_one_did(world: World, shared_dir: Path, name: str) -> None:
    with pytest.raises(Interrupted):
        run(shared_dir / "a", world, NODES[name], stop=StopAt(5))
    owed = kept(world, shared_dir / "a")
    assert any(int(value.count_nonzero()) for value in owed.values())

    def alone() -> dict[str, list[float]]:
        return {key: value.tolist() for key, value in kept(SingleWorld(), shared_dir / "a").items()}

    found = world.main(alone, name="test.alone")
    assert found.keys() == owed.keys()
    assert all(torch.allclose(torch.tensor(found[key]), owed[key], atol=1e-6) for key in owed)

    def goes_on() -> int | None:
        return run(shared_dir / "a", SingleWorld(), NODES[name])[1].resumed_from_step

    assert world.main(goes_on, name="test.goes_on") == 5


def test_bytes_are_those_of_the_tensors_given_to_horovod(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted a second time at Horovod's own door."""
    from horovod_jobs.comm import horovod_world

    seen = {"gradient": 0}

    def counting(fn: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("name")).startswith("gradient."):
                seen["gradient"] += tensor.nbytes
            return fn(tensor, *args, **kwargs)

        return call

    for name in ("allreduce_async", "allgather_async"):
        monkeypatch.setattr(horovod_world.hvd, name, counting(getattr(horovod_world.hvd, name)))
    for name in NODES:
        seen["gradient"] = 0
        told = trained(world, name, epochs=1)[1].describe()
        assert told["bytes_sent"] == seen["gradient"] > 0, name
        assert told["bytes_sent_per_step"] == round(seen["gradient"] / 20), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4)])
def test_gathering_keeps_shapes_types_and_the_order_of_ranks(
    world: World, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    mine = torch.full(shape, world.rank + 1).to(dtype)
    got = world.allgather_async(mine, name="test.gather").wait()
    assert got.dtype == dtype
    assert got.shape == (world.size, *shape)
    assert all(torch.equal(got[rank], torch.full(shape, rank + 1).to(dtype)) for rank in range(world.size))


# --- dividing before and multiplying after ---------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize(("compression", "predivide"), [("none", 4.0), ("none", 3.0), ("fp16", 8.0), ("fp16", 0.25)])
def test_predivide_gives_the_same_sum(world: World, groups: int, compression: str, predivide: float) -> None:
    got = summed(world, compression, predivide=predivide, num_groups=groups, scale=1.0)
    wanted = summed(world, "none", predivide=1.0, num_groups=0, scale=1.0)
    assert torch.allclose(got, wanted, rtol=1e-6 if compression == "none" else 4e-3)
    assert compression == "fp16" or predivide != 4.0 or torch.equal(got, wanted), "a power of two rounds nothing"


@pytest.mark.parametrize("groups", [0, 1])
def test_predivide_keeps_half_precision_from_overflowing(world: World, groups: int) -> None:
    over = summed(world, "fp16", predivide=1.0, num_groups=groups, scale=5e4)
    assert not bool(torch.isfinite(over).all())
    held = summed(world, "fp16", predivide=8.0, num_groups=groups, scale=5e4)
    assert torch.allclose(held, summed(world, "none", predivide=1.0, num_groups=0, scale=5e4), rtol=4e-3)


def summed(world: World, compression: str, *, predivide: float, num_groups: int, scale: float) -> Tensor:
    model = nn.Linear(8, 4, bias=False)
    strategy = Allreduce(compression=compression, predivide=predivide, num_groups=num_groups, tune=False)
    updater = strategy.bind(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Setting(world))
    updater.zero_grad()
    inputs = torch.linspace(0.8, 1.0, 8)[None] * (1 + 0.05 * world.rank)
    (scale * model(inputs)).sum().backward()
    updater.synchronize()
    assert model.weight.grad is not None
    found = model.weight.grad.clone()
    updater.step()
    updater.close()
    return found
