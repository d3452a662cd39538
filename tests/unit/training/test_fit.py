"""The fit loop in a world of one: resume, stop, damage, non-finite losses."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.data.augment import ShiftFlipCrop
from horovod_jobs.errors import ConfigError, Interrupted, InterruptedByUser, NonFiniteError
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.stages import train
from horovod_jobs.stages.base import StageResult
from horovod_jobs.training.checkpoint import Checkpoints
from tests.support import SMALL_NET, blob_data, context, fit_config, train_stage

WITH_DROPOUT = {**SMALL_NET, "dropout": 0.3}


class StopAt(StopRequest):
    """Asks to stop when it has been looked at so many times: once a step."""

    def __init__(self, step: int, code: int = 1) -> None:
        self._left, self._code = step, code

    @property
    def code(self) -> int:
        self._left -= 1
        return self._code if self._left <= 0 else 0


def run(
    directory: Path, *, stop: StopRequest | None = None, data: Any = None, **fit: Any
) -> tuple[dict[str, Tensor], StageResult]:
    ctx = context(directory, stop=stop, data=data)
    result = train.run(ctx, train_stage(model=WITH_DROPOUT, fit=fit_config(**fit)))
    return load_file(ctx.staging / "model.safetensors"), result


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"publish": "best"}, {"accumulate": 2, "clip_norm": 0.5},
                                      {"precision": "bf16"},
                                      {"precision": "fp16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 5, 7])
def test_a_run_that_was_cut_ends_in_the_same_place(tmp_path: Path, settings: dict[str, Any], cut: int) -> None:
    """5 steps an epoch: in the middle of the first epoch, at its very end, in the middle of the second."""
    data = blob_data(augment=ShiftFlipCrop(shift=1, flip=True))
    whole, straight = run(tmp_path / "a", data=data, **settings)
    with pytest.raises(Interrupted, match=f"after step {cut} of 10; the same command goes on"):
        run(tmp_path / "b", stop=StopAt(cut), data=data, **settings)
    resumed, result = run(tmp_path / "b", data=data, **settings)
    assert result.resumed_from_step == cut
    assert same(whole, resumed)
    without_speed = lambda history: [{k: v for k, v in entry.items() if k != "samples_per_s"} for entry in history]  # noqa: E731
    assert without_speed(result.details["history"]) == without_speed(straight.details["history"])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = run(tmp_path / "a")
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop=StopAt(8), checkpoint_every_steps=3)
    steps = sorted((tmp_path / "b/store/.work").glob("*/step-*"))
    assert [path.name for path in steps] == ["step-000000006", "step-000000008"], "the last two are kept"
    damage(steps[-1] / "state.pt")
    with caplog.at_level(logging.WARNING):
        resumed, result = run(tmp_path / "b", checkpoint_every_steps=3)
    assert result.resumed_from_step == 6
    assert "checkpoint step-000000008 is damaged; falling back to the one before" in caplog.text
    assert same(whole, resumed)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_with_best(directory: Path, **fit: Any) -> list[Path]:
    """A run that is cut off after step 13 of 15, its best being that of step 5; gives the files of the best weights."""
    with pytest.raises(Interrupted):
        run(directory, stop=StopAt(13), **fit)
    return sorted((directory / "store/.work").glob("*/best-*/state.pt"))


def test_the_best_weights_are_kept_whatever_is_published(tmp_path: Path) -> None:
    kept = cut_with_best(tmp_path, epochs=3, checkpoint_every_steps=6, checkpoint_keep=3)
    assert [path.parent.name for path in kept] == ["best-000000005", "best-000000010"], "of steps 12 and 13, and of 6"


@pytest.mark.parametrize("every", [3, 6, 20], ids=lambda every: f"a checkpoint every {every} steps")
def test_damaged_best_weights_send_the_run_back_or_are_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int
) -> None:
    fit = {"publish": "best", "epochs": 3, "checkpoint_every_steps": every, "checkpoint_keep": 3}
    whole, straight = run(tmp_path / "a", **fit)
    for path in cut_with_best(tmp_path / "b", **fit)[-1:]:
        damage(path)
    with caplog.at_level(logging.WARNING):
        resumed, result = run(tmp_path / "b", **fit)
    assert "checkpoint best-000000010, the best weights of step-000000013, is damaged; falling back" in caplog.text
    if every == 20:  # There is nothing before it.
        assert result.resumed_from_step == 13
        assert (
            "the best weights, those of step 10, are damaged or gone; the best from here on are published"
            in caplog.text
        )
        assert result.details["best_step"] == 15
    else:
        assert result.resumed_from_step == {3: 9, 6: 6}[every]
        assert result.details["best_step"] == straight.details["best_step"]
        assert same(whole, resumed)


def test_best_weights_that_are_damaged_while_the_run_goes_on_give_way_to_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoints.load_best

    def damaged(self: Checkpoints, step: int) -> Any:
        damage(tmp_path / f"best/store/.work/model-{'ab' * 8}/best-{step:09d}/state.pt")
        return load(self, step)

    monkeypatch.setattr(Checkpoints, "load_best", damaged)
    last, _ = run(tmp_path / "last")
    with caplog.at_level(logging.WARNING):
        best, result = run(tmp_path / "best", publish="best")
    assert "are damaged or gone; the last weights are published" in caplog.text
    assert result.details["best_step"] is None
    assert same(last, best)


def test_ctrl_c_has_its_own_exit_code(tmp_path: Path) -> None:
    with pytest.raises(InterruptedByUser) as caught:
        run(tmp_path, stop=StopAt(2, code=2))
    assert caught.value.exit_code == 130
    assert Interrupted("").exit_code == 75


def test_a_non_finite_loss_names_step_and_samples(tmp_path: Path) -> None:
    data = blob_data()
    data.train._inputs[17] = float("nan")
    with pytest.raises(
        NonFiniteError,
        match=r"step [0-4] \(epoch 1\) on rank 0, training samples .*lower optimizer.lr.*Nothing was published",
    ):
        run(tmp_path, data=data)
    assert not list((tmp_path / "staging/stage").iterdir())


CONSTANT = {"_target_": "horovod_jobs.training.schedules.Constant"}


@pytest.mark.parametrize("validation", [True, False], ids=["validated", "no validation split"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 7)])
def test_a_model_that_diverges_in_its_last_step_is_not_published(
    tmp_path: Path, validation: bool, epochs: int, steps: int
) -> None:
    """No loss is looked at after the last update. Earlier ones are small enough to leave a good model."""
    data = blob_data() if validation else replace(blob_data(), validation=None)
    ctx = context(tmp_path, data=data)
    schedule = {"_target_": "tests.unit.training.test_fit.RuinLast"}
    with pytest.raises(NonFiniteError, match=r"not finite.*lower optimizer.lr.*Nothing was published") as caught:
        train.run(ctx, train_stage(schedule=schedule, fit=fit_config(epochs=epochs, max_steps=steps)))
    assert caught.value.exit_code == 8
    assert f"{'after' if validation else 'last'} step" in str(caught.value)
    assert not list(ctx.staging.iterdir())


class RuinLast:
    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        return 1.0 if step < total - 1 else 1e38 / 0.05


def test_weights_that_overflow_are_named_where_nothing_validates_them(tmp_path: Path) -> None:
    data = replace(blob_data(), validation=None)
    sgd = {"_target_": "torch.optim.SGD", "lr": 3e38, "momentum": 0.9, "weight_decay": 1e3}
    with pytest.raises(NonFiniteError, match=r"after its last step, 1, on rank 0 \(model\..*\); lower optimizer.lr"):
        train.run(
            context(tmp_path, data=data), train_stage(optimizer=sgd, schedule=CONSTANT, fit=fit_config(max_steps=1))
        )


def test_a_rate_that_float32_cannot_hold_is_named(tmp_path: Path) -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 1e45}
    with pytest.raises(
        ConfigError, match=r"overflows float32 in stage stage at step 0 with the learning rate 1e\+45; lower"
    ):
        train.run(context(tmp_path), train_stage(optimizer=sgd, schedule=CONSTANT))


def test_a_figure_that_is_not_a_number_ends_the_stage(tmp_path: Path) -> None:
    """It must not become the best, nor vanish from the history."""
    ctx = context(tmp_path)
    summary = ctx.task.summary
    ctx.task.summary = lambda sums: {**summary(sums), "accuracy": float("nan")}
    with pytest.raises(
        NonFiniteError, match=r"validation in stage stage after step 5 is not finite \(validation_accuracy=nan\)"
    ):
        train.run(ctx, train_stage())


class Masked(torch.nn.Module):
    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(36, num_classes)
        self.register_buffer("mask", torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out + self.mask.softmax(1)[0, 1]


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    train.run(ctx, train_stage(model={"_target_": "tests.unit.training.test_fit.Masked"}))
    assert torch.isinf(load_file(ctx.staging / "model.safetensors")["mask"]).any()


def test_the_best_weights_are_published(tmp_path: Path) -> None:
    """A rate that ruins the second epoch: the first epoch's weights are the best."""
    schedule = {"_target_": "tests.unit.training.test_fit.RuinLater"}
    ctx = context(tmp_path)
    result = train.run(ctx, train_stage(schedule=schedule, fit=fit_config(publish="best", epochs=3)))
    accuracies = [entry["validation_accuracy"] for entry in result.details["history"]]
    assert result.details["best_step"] == 5
    assert accuracies[0] > max(accuracies[1:])
    one = context(tmp_path / "one", name="one")
    train.run(one, train_stage(schedule=schedule, fit=fit_config(epochs=1)))
    assert same(load_file(ctx.staging / "model.safetensors"), load_file(one.staging / "model.safetensors"))


class RuinLater:
    def factor(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        return 1.0 if step < steps_per_epoch else -20.0


def test_early_stop_counts_epochs_without_improvement(tmp_path: Path) -> None:
    result = train.run(context(tmp_path), train_stage(schedule={"_target_": "tests.unit.training.test_fit.RuinLater"},
                                                      fit=fit_config(epochs=9, early_stop_epochs=2)))  # fmt: skip
    assert len(result.details["history"]) == 3


def test_training_learns(tmp_path: Path) -> None:
    _, result = run(tmp_path, epochs=6)
    losses = [entry["train_loss"] for entry in result.details["history"]]
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["validation_accuracy"] > 0.8


def test_accumulation_does_not_change_the_gradient(tmp_path: Path) -> None:
    """Without batch norm's statistics in the way: one pass over the batch or three over its parts."""
    linear = {"_target_": "tests.unit.training.test_fit.Flat"}
    got = []
    for accumulate in (1, 3):
        ctx = context(tmp_path / str(accumulate))
        train.run(ctx, train_stage(model=linear, fit=fit_config(accumulate=accumulate)))
        got.append(load_file(ctx.staging / "model.safetensors"))
    assert all(torch.allclose(got[0][key], got[1][key], atol=1e-6) for key in got[0])


class Flat(torch.nn.Module):
    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


def test_linear_rate_scaling(tmp_path: Path) -> None:
    result = train.run(context(tmp_path), train_stage(schedule=CONSTANT, fit=fit_config(lr_reference_batch=6)))
    assert result.details["history"][-1]["lr"] == pytest.approx(0.05 * 24 / 6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"_target_": "torch.nn.Linear", "in_features": 5, "out_features": 3},
            r"does not fit inputs of shape \[1, 6, 6\]",
        ),
        ({"_target_": "tests.unit.training.test_fit.RuinLater"}, "gives a RuinLater; name a torch.nn.Module"),
    ],
)
def test_a_model_that_does_not_fit_is_found_before_it_trains(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train.run(context(tmp_path), train_stage(model=model))


def test_channels_last_trains_the_same(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "a", max_steps=3)
    other, _ = run(tmp_path / "b", max_steps=3, channels_last=True)
    assert all(torch.allclose(plain[key].double(), other[key].double(), atol=1e-4) for key in plain)
