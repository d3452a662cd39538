"""What several tests build: a small data set with real structure, and a stage's context in any world."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horovod_jobs.artifacts import Artifact, ArtifactStore
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.config import FitConfig, TrainStage
from horovod_jobs.console import Console, EventLog
from horovod_jobs.data.base import DataModule, TensorSplit
from horovod_jobs.footprint import Footprint
from horovod_jobs.interrupt import StopRequest
from horovod_jobs.stages.base import StageContext
from horovod_jobs.tasks.classification import Classification
from horovod_jobs.tracking import NullTracker


def blobs(samples: int, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy 1x6x6 pictures of one blob a class; [N, 1, 6, 6] and [N]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    centres = torch.randn(classes, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    return centres[targets] + torch.randn(samples, 1, 6, 6, generator=generator), targets


def blob_data(samples: int = 103, *, validation: int = 40, augment: Any = None) -> DataModule:
    """A data module of blobs. The odd number makes the last batch partial for every batch size."""
    return DataModule(
        train=TensorSplit(*blobs(samples, seed=1)),
        validation=TensorSplit(*blobs(validation, seed=2)),
        test=TensorSplit(*blobs(50, seed=3)),
        num_classes=3,
        class_names=("a", "b", "c"),
        input_shape=(1, 6, 6),
        digest="0" * 64,
        augment=augment,
    )


class SmallNet(nn.Module):
    """Convolution, batch norm, and a linear layer: all that training must keep exact."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * 36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dropout(torch.relu(self.bn(self.conv(x))).flatten(1)))
        return out


SMALL_NET = {"_target_": "tests.support.SmallNet"}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
ONE_CYCLE = {"_target_": "horovod_jobs.training.schedules.OneCycle"}
ALLREDUCE = {"_target_": "horovod_jobs.strategy.allreduce.Allreduce"}


def fit_config(**changes: Any) -> FitConfig:
    """Two short epochs; ``changes`` on top."""
    return FitConfig(**{"epochs": 2, "global_batch": 24, "checkpoint_every_s": None, **changes})


def train_stage(**changes: Any) -> TrainStage:
    """A train stage of the small net."""
    values = {
        "seed": 0,
        "model": SMALL_NET,
        "optimizer": SGD,
        "schedule": ONE_CYCLE,
        "strategy": ALLREDUCE,
        "fit": fit_config(),
    }
    return TrainStage(**{**values, **changes})


def context(
    directory: Path,
    *,
    world: World | None = None,
    data: DataModule | None = None,
    inputs: dict[str, Artifact] | None = None,
    name: str = "stage",
    fingerprint: str = "ab" * 32,
    stop: StopRequest | None = None,
    seed: int = 0,
) -> StageContext:
    """Everything a stage needs, in ``directory`` (the same on all ranks)."""
    world = world or SingleWorld()
    store = ArtifactStore(directory / "store")
    staging = directory / "staging" / name
    staging.mkdir(parents=True, exist_ok=True)
    return StageContext(
        name=name,
        fingerprint=fingerprint,
        world=world,
        inputs=inputs or {},
        staging=staging,
        work=store.work("model", fingerprint),
        run_dir=directory,
        store=store,
        data=data or blob_data(),
        task=Classification(num_classes=3),
        allow_targets=("tests",),
        seed=seed,
        log=logging.getLogger("horovod_jobs"),
        console=Console(is_main=False, mode="none"),
        events=EventLog(None),
        tracker=NullTracker(),
        stop=stop or StopRequest(),
        spent=Footprint.zero,
    )
