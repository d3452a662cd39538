"""Ranks train what one process trains: exact sharding, synchronised statistics, agreed stops."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.artifacts import Artifact
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.config import DistillStage
from horovod_jobs.data.augment import ShiftFlipCrop
from horovod_jobs.distillation.cache import teacher_outputs
from horovod_jobs.errors import DataError, Interrupted, NonFiniteError
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.predict import load_module
from horovod_jobs.stages import distill, train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.storage import digest_of
from horovod_jobs.strategy import allreduce
from horovod_jobs.training.nonfinite import refuse_bad_weights
from horovod_jobs.training.state import FitState
from tests.support import ALLREDUCE, SmallNet, blob_data, context, fit_config, train_stage


class StopAt(StopRequest):
    """Asks this rank to stop when it has been looked at so many times: once a step."""

    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def code(self) -> int:
        self._left -= 1
        return 1 if self._left <= 0 else 0


def run(directory: Path, world: World, *, samples: int = 103, stop: StopRequest | None = None, strategy: dict | None = None,
        **fit: Any) -> tuple[dict[str, Tensor], StageResult]:  # fmt: skip
    data = blob_data(samples, augment=ShiftFlipCrop(shift=1, flip=True))
    ctx = context(directory, world=world, data=data, stop=stop)
    result = train.run(ctx, train_stage(fit=fit_config(**fit), strategy=strategy or ALLREDUCE))
    return load_file(ctx.staging / "model.safetensors"), result


def alone(world: World, directory: Path, **settings: Any) -> tuple[dict[str, Tensor], StageResult]:
    return run(directory / f"alone-{world.rank}", SingleWorld(), **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"samples": 97}, {"samples": 98}, {"accumulate": 2}, {"clip_norm": 0.1}, {"ema_decay": 0.9}, {"drop_last": True},
     {"max_steps": 7}],
    ids=str,
)  # fmt: skip
def test_the_world_size_does_not_change_the_loss_curve(
    world: World, shared_dir: Path, settings: dict[str, Any]
) -> None:
    """97 samples leave a last batch of one: every rank but one has nothing in it."""
    ours, result = run(shared_dir, world, **settings)
    wanted, straight = alone(world, shared_dir, **settings)
    if "accumulate" not in settings:  # Batch norm sees parts of a batch, which are cut differently in another world.
        for key, value in wanted.items():
            assert torch.allclose(ours[key].double(), value.double(), rtol=1e-3, atol=2e-4), key
        for got, want in zip(result.details["history"], straight.details["history"], strict=True):
            assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-4)
            assert got["validation_loss"] == pytest.approx(want["validation_loss"], rel=1e-3)
            assert got["validation_accuracy"] == pytest.approx(want["validation_accuracy"], abs=0.03)
    assert result.metrics["steps"] == straight.metrics["steps"]


def test_every_rank_ends_with_the_same_weights(world: World, shared_dir: Path) -> None:
    ctx = context(shared_dir, world=world)
    objective_holder: list[torch.nn.Module] = []
    fit_and_save = train.fit_and_save

    def keep(ctx: Any, cfg: Any, objective: torch.nn.Module, **rest: Any) -> StageResult:
        objective_holder.append(objective)
        return fit_and_save(ctx, cfg, objective, **rest)

    train.fit_and_save = keep
    try:
        train.run(ctx, train_stage())
    finally:
        train.fit_and_save = fit_and_save
    for key, value in objective_holder[0].state_dict().items():
        low = world.allreduce(value.double(), name=f"test.{key}.min", op="min")
        high = world.allreduce(value.double(), name=f"test.{key}.max", op="max")
        assert torch.equal(low, high), key


class ByRank(SmallNet):
    """Starts from weights and statistics that depend on the rank, and does not learn."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__(num_classes=num_classes, input_shape=input_shape)
        with torch.no_grad():
            for tensor in [*self.parameters(), self.bn.running_mean]:
                tensor.fill_(0.1 * (1 + int(os.environ["HOROVOD_JOBS_TEST_RANK"])))


def test_all_ranks_start_from_rank_0s_weights(world: World, shared_dir: Path) -> None:
    """Nothing is learnt, so each rank ends where it began: at 0.1, which is rank 0's. Seeded alike, ranks would begin alike anyway."""
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    ended = []

    def keep(ctx: Any, cfg: Any, objective: torch.nn.Module, **rest: Any) -> StageResult:
        ended.append(objective)
        return fit_and_save(ctx, cfg, objective, **rest)

    fit_and_save = train.fit_and_save
    train.fit_and_save = keep
    try:
        model = {"_target_": "tests.parallel.test_training.ByRank"}
        train.run(context(shared_dir, world=world), train_stage(model=model, optimizer=still))
    finally:
        train.fit_and_save = fit_and_save
    told = world.gather_json(
        [parameter.detach().mean().item() for parameter in ended[0].parameters()], name="test.ended"
    )
    for means in told:
        assert means == pytest.approx([0.1] * len(means))


def test_a_stop_asked_of_one_rank_stops_all_and_resuming_is_exact(world: World, shared_dir: Path) -> None:
    whole, _ = run(shared_dir / "a", world)
    stop = StopAt(7) if world.rank == world.size - 1 else None
    with pytest.raises(Interrupted, match="after step 7 of 10"):
        run(shared_dir / "b", world, stop=stop)
    resumed, result = run(shared_dir / "b", world)
    assert result.resumed_from_step == 7
    if world.size == 2:  # The sum of two numbers does not depend on their order; of three it does, by rounding.
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    else:
        assert all(torch.allclose(whole[key].double(), resumed[key].double(), atol=1e-5) for key in whole)


def test_a_non_finite_loss_on_one_rank_stops_all(world: World, shared_dir: Path) -> None:
    data = blob_data()
    data.train._inputs[17] = float("inf")
    with pytest.raises(NonFiniteError, match=r"on rank \d.*, training samples .*the inputs of 17 are not finite"):
        train.run(context(shared_dir, world=world, data=data), train_stage())


@pytest.mark.parametrize("validation", [True, False], ids=["validated", "no validation split"])
def test_a_model_that_diverges_in_its_last_step_stops_all(world: World, shared_dir: Path, validation: bool) -> None:
    data = blob_data() if validation else replace(blob_data(), validation=None)
    ctx = context(shared_dir, world=world, data=data)
    schedule = {"_target_": "tests.unit.training.test_fit.RuinLast"}
    with pytest.raises(NonFiniteError, match=r"not finite.*Nothing was published"):
        train.run(ctx, train_stage(schedule=schedule))
    assert not list(ctx.staging.iterdir())


def test_bad_weights_of_one_rank_stop_all(world: World, shared_dir: Path) -> None:
    ctx = context(shared_dir, world=world)
    module = torch.nn.Linear(2, 1)
    if world.rank == world.size - 1:
        module.weight.data[0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"after its last step, 3, on rank {world.size - 1} \(weight\)"):
        refuse_bad_weights(ctx, FitState(step=3), module, before=set())


def test_a_user_error_on_one_rank_before_training_stops_all(world: World, shared_dir: Path) -> None:
    class Broken:
        def __len__(self) -> int:
            return 103

        def fetch(self, indices: Tensor) -> None:
            raise DataError("file is gone (x); fetch it again") if world.rank else RuntimeError("first rank")

    data = replace(blob_data(), train=Broken())
    with pytest.raises(Exception, match=r"gone|first rank|does not fit"):
        train.run(context(shared_dir, world=world, data=data), train_stage())


def test_tuning_keeps_the_result(world: World, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(shared_dir / "a", world, epochs=6, strategy={**ALLREDUCE, "tune": False})
    monkeypatch.setattr(allreduce, "_ROUNDS", 1)
    monkeypatch.setattr(allreduce, "_STEPS_A_TURN", 3)
    monkeypatch.setattr(allreduce, "PROBE_STEPS", 3)
    tuned, result = run(shared_dir / "b", world, epochs=6)
    assert set(result.details["exchange"]["tuned_step_ms_by_num_groups"]) == {"0", "1", "2", "4"}
    assert all(
        torch.allclose(plain[key].double(), tuned[key].double(), atol=0 if world.size == 2 else 1e-4) for key in plain
    )


def test_fp16_compression_is_near(world: World, shared_dir: Path) -> None:
    plain, _ = run(shared_dir / "a", world)
    half, _ = run(shared_dir / "b", world, strategy={**ALLREDUCE, "compression": "fp16"})
    assert any(not torch.equal(plain[key], half[key]) for key in plain), "it really is on"
    assert all(torch.allclose(plain[key].double(), half[key].double(), atol=0.02) for key in plain)


# torch.compile imports a part of torch that still uses TorchScript, and looks at gradients where it goes on after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("setting", [{"channels_last": True}, {"compile": True}, {"precision": "bf16"}], ids=str)
def test_layout_compiler_and_precision_train_in_a_world(
    world: World, shared_dir: Path, setting: dict[str, Any]
) -> None:
    plain, _ = run(shared_dir / "a", world, max_steps=4)
    other, result = run(shared_dir / "b", world, max_steps=4, **setting)
    assert result.metrics["steps"] == 4
    assert all(torch.allclose(plain[key].double(), other[key].double(), atol=0.05) for key in plain)


def published(ctx: Any, *, fingerprint: str) -> Artifact:
    """Publish what a stage wrote."""
    path = ctx.world.main(
        lambda: str(
            ctx.store.publish(ctx.staging, kind="model", fingerprint=fingerprint, meta={"stage": ctx.name}).path
        ),
        name="test.publish",
    )
    artifact = ctx.store.lookup("model", fingerprint)
    assert artifact is not None
    assert str(artifact.path) == path
    return artifact


def distill_stage(*, precision: str = "fp32", **distiller: Any) -> DistillStage:
    base = train_stage(fit=fit_config(precision=precision))
    terms = {"soft": {"_target_": "horovod_jobs.distillation.losses.SoftTargets", "weight": 0.9},
             "hard": {"_target_": "horovod_jobs.distillation.losses.HardLabels", "weight": 0.1}}  # fmt: skip
    node = {"_target_": "horovod_jobs.distillation.Distiller", "terms": terms, **distiller}
    return DistillStage(**{**base.__dict__, "kind": "distill", "distiller": node, "augment": False})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_live_and_single_process_distillation_agree(world: World, shared_dir: Path, precision: str) -> None:
    ctx = context(shared_dir, world=world, name="teacher")
    train.run(ctx, train_stage())
    teacher = published(ctx, fingerprint="cd" * 32)
    histories = []
    for name, where, cache in (
        ("live", world, False),
        ("cached", world, True),
        (f"alone-{world.rank}", SingleWorld(), True),
    ):
        print_ = digest_of(name)  # One a rank where ranks train alone: they keep checkpoints by it.
        student = context(shared_dir, world=where, name=name, inputs={"teacher": teacher}, fingerprint=print_, seed=1)
        histories.append(distill.run(student, distill_stage(cache=cache, precision=precision)).details["history"])
    for live, cached, single in zip(*histories, strict=True):
        assert cached["train_loss"] == pytest.approx(live["train_loss"], rel=1e-5)
        # In bf16 a share of a batch is rounded in another way than the whole.
        assert single["train_loss"] == pytest.approx(cached["train_loss"], rel=1e-4 if precision == "fp32" else 0.02)


def test_the_cache_holds_the_teachers_outputs_in_order_and_is_made_again_when_damaged(
    world: World, shared_dir: Path
) -> None:
    ctx = context(shared_dir, world=world, name="teacher")
    train.run(ctx, train_stage())
    teacher = published(ctx, fingerprint="cd" * 32)
    model = load_module(teacher, allow_targets=("tests",))
    outputs, ref, made = teacher_outputs(ctx, teacher, model, device=torch.device("cpu"))
    with torch.no_grad():
        wanted = model(ctx.data.train.fetch(torch.arange(103)).inputs)
    outputs = outputs.clone()  # The file is mapped into memory, and about to be damaged.
    assert made
    assert torch.allclose(outputs, wanted, atol=1e-5)
    assert not teacher_outputs(ctx, teacher, model, device=torch.device("cpu"))[2], "the second time it is there"
    world.main(
        lambda: (shared_dir / "store" / ref / "outputs.safetensors").write_bytes(b"x") and None, name="test.damage"
    )
    again, _, made = teacher_outputs(ctx, teacher, model, device=torch.device("cpu"))
    assert made
    assert torch.equal(again, outputs)
