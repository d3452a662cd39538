"""Settings that a run could ignore and still train: each is caught at work, or held against its formula."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.comm import world as world_module
from horovod_jobs.console import EventLog
from horovod_jobs.stages import train
from horovod_jobs.training import fit as fit_module
from tests.support import SmallNet, blob_data, context, fit_config, train_stage

CONSTANT = {"_target_": "horovod_jobs.training.schedules.Constant"}
WATCHED = {"_target_": "tests.unit.training.test_switches.Watched"}
seen: list[Any] = []


class Watched(SmallNet):
    """Writes down what its forward pass is given and makes, in training."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(x)
        out: Tensor = self.head(torch.relu(self.bn(inner)).flatten(1))
        if self.training:
            layouts = [
                tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, self.conv.weight, inner)
            ]
            seen.append(SimpleNamespace(inner=inner.dtype, out=out.dtype, layouts=layouts))
        return out


def watch(directory: Path, **fit: Any) -> list[Any]:
    """What the forward passes of three steps saw. Three channels: with one, every layout is channels_last."""
    seen.clear()
    data = blob_data()
    wide = {part: ThreeChannels(getattr(data, part)) for part in ("train", "validation", "test")}
    train.run(
        context(directory, data=replace(data, input_shape=(3, 6, 6), **wide)),
        train_stage(model=WATCHED, fit=fit_config(max_steps=3, **fit)),
    )
    assert len(seen) == 3
    return list(seen)


class ThreeChannels:
    """The pictures of another split, with three channels."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def fetch(self, indices: Tensor) -> Any:
        batch = self._split.fetch(indices)
        return replace(batch, inputs=batch.inputs.repeat(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_forward_pass_computes_in_the_precision_that_was_asked_for(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    for step in watch(tmp_path, precision=precision):
        assert (step.inner, step.out) == (dtype, dtype)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_convolutions_have_the_layout_that_was_asked_for(tmp_path: Path, channels_last: bool) -> None:
    for step in watch(tmp_path, channels_last=channels_last):
        assert step.layouts == [channels_last] * 3


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_go_through_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """A backend that counts what it is given and how often that is called, and otherwise leaves it alone."""
    graphs, calls = [], []

    def counting(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)

        def call(*arguments: Any) -> Any:
            calls.append(graph)
            return graph.forward(*arguments)

        return call

    torch.compiler.reset()
    own = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: own(self, backend=counting))
    try:
        train.run(context(tmp_path), train_stage(fit=fit_config(max_steps=3, compile=compiled)))
    finally:
        torch.compiler.reset()
    assert bool(graphs) == compiled
    assert len(calls) >= 3 * compiled


class Two(torch.nn.Module):
    """One weight matrix."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


def test_the_average_is_that_of_the_formula(tmp_path: Path) -> None:
    """After two steps: d^2 w0 + d (1 - d) w1 + (1 - d) w2, from runs that end after 1 and 2 steps without averaging."""
    decay = 0.7

    def weights(steps: int, **fit: Any) -> dict[str, Tensor]:
        ctx = context(tmp_path / f"{steps}-{len(fit)}")
        train.run(
            ctx,
            train_stage(
                model={"_target_": "tests.unit.training.test_switches.Two"},
                schedule=CONSTANT,
                fit=fit_config(max_steps=steps, **fit),
            ),
        )
        return load_file(ctx.staging / "model.safetensors")

    stage = train_stage(model={"_target_": "tests.unit.training.test_switches.Two"})
    w0 = train.build_model(context(tmp_path / "start"), stage).state_dict()
    w1, w2, averaged = weights(1), weights(2), weights(2, ema_decay=decay)
    for key, value in averaged.items():
        wanted = decay**2 * w0[key] + decay * (1 - decay) * w1[key] + (1 - decay) * w2[key]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, w2[key]), "what is published is not the last weights"


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        time.sleep(0.02)
        super().step(closure)


class SlowSplit:
    """Takes 5 ms to read a batch."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def fetch(self, indices: Tensor) -> Any:
        time.sleep(0.005)
        return self._split.fetch(indices)


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is slowed down, so that one that is left out or counted elsewhere shows."""
    monkeypatch.setattr(world_module._LocalExchange, "synchronize", lambda _: time.sleep(0.01))
    data = blob_data()
    sgd = {"_target_": "tests.unit.training.test_switches.SlowSGD", "lr": 0.05}
    ctx = context(tmp_path, data=replace(data, train=SlowSplit(data.train)))
    metrics = train.run(ctx, train_stage(optimizer=sgd)).metrics
    parts = {key: metrics[f"{key}_ms"] for key in ("data", "compute", "exchange")}
    assert sum(parts.values()) == pytest.approx(metrics["step_ms"], rel=0.05)
    assert parts["data"] >= 5
    assert parts["compute"] >= 20
    assert parts["exchange"] >= 10
    assert metrics["samples_per_s"] == pytest.approx(103 / 5 / metrics["step_ms"] * 1000, rel=0.05)


@pytest.mark.parametrize(("every_s", "wanted"), [(25.0, [3, 6, 9]), (15.0, [2, 4, 6, 8, 10]), (None, [])])
def test_a_checkpoint_is_due_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float | None, wanted: list[int]
) -> None:
    """A clock that goes on by 10 s whenever it is read: once at the start, once a step, once a checkpoint."""
    now = 0.0

    def ticking() -> float:
        nonlocal now
        now += 10.0
        return now

    clock = SimpleNamespace(monotonic=ticking, perf_counter=time.perf_counter)
    monkeypatch.setattr(fit_module, "time", clock)
    log = Events()
    train.run(replace(context(tmp_path), events=log), train_stage(fit=fit_config(checkpoint_every_s=every_s)))
    assert log.checkpoints == wanted


class Events(EventLog):
    """Keeps the steps of checkpoints."""

    def __init__(self) -> None:
        super().__init__(None)
        self.checkpoints: list[int] = []

    def emit(self, event: str, **fields: Any) -> None:
        if event == "checkpoint":
            self.checkpoints.append(fields["step"])
