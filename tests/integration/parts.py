"""Data sets and models that the integration tests' jobs name by ``_target_``: small, and some of them wrong on purpose."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import World
from horovod_jobs.data.base import Batch, DataModule, TensorSplit
from horovod_jobs.quantization.base import Calibration
from horovod_jobs.quantization.quantizer import StaticInt8

CLOCK_JUMPS = "HOROVOD_JOBS_TEST_CLOCK_JUMPS"  # the rank whose wall clock jumps


def _let_the_clock_jump() -> None:
    """An hour forth and an hour back, by turns every half second."""
    real = time.time
    time.time = lambda: real() + (3600 if int(2 * time.monotonic()) % 2 else -3600)


if os.environ.get(CLOCK_JUMPS, "") == os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "none")):
    _let_the_clock_jump()


def pictures(
    *,
    samples: int = 240,
    classes: int = 4,
    side: int = 6,
    augment: Any = None,
    names: Sequence[str] = (),
    not_finite: int | None = None,
    labels_up_to: int | None = None,
    record_environment_in: str | None = None,
    wait_at_sample: tuple[int, str] | None = None,
    without_validation: bool = False,
) -> DataModule:
    """Noisy pictures of one blob a class, [1, side, side]; the other arguments make it wrong, or tell what a rank can see."""
    if record_environment_in is not None:
        (Path(record_environment_in) / f"{os.getpid()}.txt").write_text("\n".join(sorted(os.environ)), encoding="utf-8")
    splits = [
        _split(samples=count, classes=labels_up_to or classes, side=side, seed=seed)
        for count, seed in ((samples, 1), (40, 2), (48, 3))
    ]
    if not_finite is not None:
        inputs, targets = splits[0]
        inputs[not_finite] = torch.nan
        splits[0] = (inputs, targets)
    train: Any
    train, validation, test = (TensorSplit(*split) for split in splits)
    if wait_at_sample is not None:
        train = WaitsForEver(train, sample=wait_at_sample[0], told=Path(wait_at_sample[1]))
    return DataModule(
        train=train,
        validation=None if without_validation else validation,
        test=test,
        num_classes=classes,
        class_names=tuple(names) or tuple(f"class {number}" for number in range(classes)),
        input_shape=(1, side, side),
        digest=f"{samples:08x}{classes:08x}{side:08x}".rjust(64, "0"),
        augment=augment,
    )


def _split(*, samples: int, classes: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    centres = torch.randn(classes, 1, side, side, generator=torch.Generator().manual_seed(99))
    return centres[targets] + torch.randn(samples, 1, side, side, generator=generator), targets


class WaitsForEver:
    """A split that hangs on one sample, after it has told so by making a file."""

    def __init__(self, split: TensorSplit, *, sample: int, told: Path) -> None:
        self._split, self._sample, self._told = split, sample, told

    def __len__(self) -> int:
        return len(self._split)

    def fetch(self, indices: Tensor) -> Batch:
        if self._sample in indices.tolist():
            self._told.touch()
            threading.Event().wait()
        return self._split.fetch(indices)


class NoTest:
    """A data set whose author forgot the test split."""

    def __init__(self) -> None:
        self.train = [(torch.zeros(1, 6, 6), 0), (torch.ones(1, 6, 6), 1)]


class TurnsRound:
    """A recipe whose integer model gives the least likely class: it quantizes a copy whose last layer is negated."""

    name = "turns_round"
    format = "onnx"

    def quantize(
        self, model: nn.Module, *, input_shape: Sequence[int], calibration: Calibration, world: World, path: Path
    ) -> dict[str, Any]:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in wrong.get_submodule("head").parameters():
                parameter.neg_()
        return StaticInt8().quantize(wrong, input_shape=input_shape, calibration=calibration, world=world, path=path)


def not_a_model(*, num_classes: int) -> list[int]:
    """A ``_target_`` that builds something else."""
    return [num_classes]


class Refuses(nn.Module):
    """A model that refuses its arguments by an exception of its own choice."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        raise ValueError(f"width {width} is odd")
