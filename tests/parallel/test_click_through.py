"""Sparse gradients and AUC over ranks: what ranks do together is what one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.data.base import DataModule
from horovod_jobs.data.categorical import Field, ForgetIds, IdSplit
from horovod_jobs.errors import ConfigError
from horovod_jobs.evaluation import evaluate
from horovod_jobs.predict import load
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.tasks.ctr import ClickThrough
from tests.support import ALLREDUCE, context, fit_config, train_stage

FIELDS = (Field("user", 41), Field("item", 301), Field("tags", 6, 2))


def clicks(samples: int, *, seed: int) -> IdSplit:
    """Rows of ids, clicked where the user's and the item's number agree in their last bit, but for one in ten."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.stack(
        [
            torch.randint(0, size, (samples,), generator=generator)
            for _, size, columns in FIELDS
            for _ in range(columns)
        ],
        1,
    )
    noise = torch.rand(samples, generator=generator) < 0.1
    return IdSplit(inputs, ((inputs[:, 0] + inputs[:, 1]) % 2 == 0).logical_xor(noise).long(), fields=FIELDS)


def click_data(samples: int) -> DataModule:
    return DataModule(
        train=clicks(samples, seed=1),
        validation=clicks(60, seed=2),
        test=clicks(83, seed=3),
        num_classes=2,
        class_names=("no", "yes"),
        input_shape=(4,),
        digest="1" * 64,
        augment=ForgetIds(shares=[0.1, 0.1]),
        fields=FIELDS,
    )


def run(
    directory: Path, world: World, *, sparse: bool, samples: int = 193, optimizer: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None, **fit: Any,
) -> tuple[dict[str, Tensor], StageResult]:  # fmt: skip
    ctx = replace(context(directory, world=world, data=click_data(samples)), task=ClickThrough())
    model = {
        "_target_": "horovod_jobs.models.wide_deep.WideDeep",
        "embedding_dim": 4,
        "hidden": [8],
        "crosses": [["user", "item"]],
        "buckets": 5000,
        "sparse": sparse,
    }
    stage = train_stage(
        model=model,
        optimizer=optimizer or {"_target_": "torch.optim.Adagrad", "lr": 0.05},
        strategy=strategy or ALLREDUCE,
        fit=fit_config(**{"global_batch": 24, "epochs": 3, **fit}),
    )
    result = train.run(ctx, stage)
    return load_file(ctx.staging / "model.safetensors"), result


def alone(world: World, directory: Path, **settings: Any) -> tuple[dict[str, Tensor], StageResult]:
    return run(directory / f"alone-{world.rank}", SingleWorld(), **settings)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"strategy": {**ALLREDUCE, "predivide": 4.0}},
     {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5}}],
    ids=str,
)  # fmt: skip
def test_sparse_gradients_train_what_dense_ones_and_one_process_train(
    world: World, shared_dir: Path, settings: dict[str, Any]
) -> None:
    """193 samples leave a last batch of one: every rank but one has no rows to send."""
    together, result = run(shared_dir / "sparse", world, sparse=True, **settings)
    dense, _ = run(shared_dir / "dense", world, sparse=False, **settings)
    single, straight = alone(world, shared_dir, sparse=True, **settings)
    same(together, dense)
    same(together, single)
    assert result.metrics["validation_auc"] == pytest.approx(straight.metrics["validation_auc"], abs=0.005)
    assert result.metrics["steps"] == straight.metrics["steps"] == 27


def test_only_touched_rows_travel(world: World, shared_dir: Path) -> None:
    sent = {
        sparse: run(shared_dir / str(sparse), world, sparse=sparse)[1].details["exchange"]["bytes_sent_per_step"]
        for sparse in (True, False)
    }
    if world.size == 1:
        assert sent == {True: 0, False: 0}
    else:
        rows = 24 // world.size * (4 + 4 + 1)  # at most, of two tables and the crossed one: all ids differ
        assert 0 < sent[True] < rows * (4 * 4 + 4) + 1500, "the MLP's 1 kB is dense"
        assert sent[False] > 5000 * 4 * 4


def test_half_precision_holds_for_rows_too(world: World, shared_dir: Path) -> None:
    strategy = {**ALLREDUCE, "compression": "fp16"}
    half, result = run(shared_dir / "half", world, sparse=True, strategy=strategy)
    whole, straight = run(shared_dir / "whole", world, sparse=True)
    for key, value in whole.items():
        torch.testing.assert_close(half[key], value, rtol=0.05, atol=0.01)
    if world.size > 1:
        assert (
            result.details["exchange"]["bytes_sent_per_step"]
            < 0.8 * straight.details["exchange"]["bytes_sent_per_step"]
        )


def test_a_long_stage_does_not_look_for_groups(world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod_jobs.strategy import allreduce

    monkeypatch.setattr(allreduce, "PROBE_STEPS", 2)
    result = run(shared_dir, world, sparse=True)[1]
    assert result.details["exchange"]["num_groups"] == 0
    assert result.details["exchange"]["tuned_step_ms_by_num_groups"] == {}


@pytest.mark.world_size(2, 3, 4)
def test_sparse_gradients_cannot_be_grouped(world: World, shared_dir: Path) -> None:
    with pytest.raises(ConfigError, match="num_groups cannot group sparse gradients"):
        run(shared_dir, world, sparse=True, strategy={**ALLREDUCE, "num_groups": 2, "tune": False})


def test_auc_is_the_same_for_every_number_of_ranks(world: World, shared_dir: Path) -> None:
    """Ties included: this model knows five scores."""
    split = clicks(1003, seed=4)
    five = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5])

    def predict(ids: Tensor) -> Tensor:
        scores = five[(ids[:, 0] + ids[:, 1]) % 5]
        return torch.stack([torch.zeros_like(scores), scores], 1)

    task = ClickThrough()
    ours = task.summary(evaluate(predict, split, task, world=world, batch=17, name="test.auc"))
    single = task.summary(evaluate(predict, split, task, world=SingleWorld(), batch=250, name="test.alone"))
    assert (ours["auc"], ours["accuracy"], ours["count"]) == (single["auc"], single["accuracy"], 1003)
    assert ours["loss"] == pytest.approx(single["loss"], rel=1e-6)
    assert ours["calibration"] == pytest.approx(single["calibration"], rel=1e-9)
    exact = roc_auc_score(split.targets.numpy(), predict(split.inputs)[:, 1].numpy())
    assert ours["auc"] == pytest.approx(exact, abs=1e-12)


def test_what_was_trained_can_be_loaded_and_takes_ids(world: World, shared_dir: Path) -> None:
    run(shared_dir, world, sparse=True)
    world.barrier(name="test.written")
    model = load(shared_dir / "staging" / "stage")
    assert (model.input_dtype, model.fields) == ("int64", tuple(tuple(field) for field in FIELDS))
    assert model(clicks(5, seed=9).inputs).shape == (5, 2)
    world.barrier(name="test.read")


def test_local_sgd_counts_the_rows_that_its_first_steps_sent(world: World, shared_dir: Path) -> None:
    """All steps are all-reduce's own, so the bytes are, too."""
    local = {"_target_": "horovod_jobs.strategy.local_sgd.LocalSgd", "period": 3, "start_step": 1000}
    _, straight = run(shared_dir / "a", world, sparse=True, epochs=1, sync_batchnorm=False)
    _, result = run(shared_dir / "b", world, sparse=True, epochs=1, strategy=local, sync_batchnorm=False)
    ours, theirs = (found.details["exchange"] for found in (result, straight))
    assert ours["bytes_sent"] == theirs["bytes_sent"]
    assert world.size == 1 or 0 < ours["bytes_sent"] < ours["bytes_uncompressed"] / 4
