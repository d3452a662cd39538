"""The seam between recipes and backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import World

if TYPE_CHECKING:
    from horovod_jobs.data.base import Split


@dataclass(frozen=True)
class Calibration:
    """The samples a recipe may observe: positions in a split, in batches that every world deals out alike."""

    split: Split
    batches: Sequence[Tensor]

    @property
    def input_dtype(self) -> torch.dtype:
        """The type of a model's inputs."""
        return self.split.fetch(torch.empty(0, dtype=torch.int64)).inputs.dtype


@dataclass(frozen=True)
class DynamicScheme:
    """Linear layers with integer weights whose inputs are quantized at run time, by the range of each batch."""

    per_channel: bool
    reduce_range: bool


@dataclass(frozen=True)
class Program:
    """What a recipe hands to a backend.

    module: a graph with quantize and dequantize operations (``dynamic`` is None), or a float module that the backend
    quantizes by ``dynamic``.
    """

    module: nn.Module
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    dynamic: DynamicScheme | None = None


class Backend(Protocol):
    """Writes a program as the file that one runtime loads. ``format`` is that file's, one of ``runtimes.FORMATS``."""

    name: str
    format: str

    def write(self, program: Program, path: Path) -> dict[str, Any]:
        """Write the file and say in JSON what the runtime makes of it. Called on rank 0 only.

        Raises:
            ConfigError: the program has something that the runtime cannot do.
            StorageError: no space or no permission.
        """
        ...


class Recipe(Protocol):
    """Decides what becomes an integer. ``format`` is that of the file that its backend writes."""

    name: str

    @property
    def format(self) -> str: ...

    def quantize(
        self, model: nn.Module, *, input_shape: Sequence[int], calibration: Calibration, world: World, path: Path
    ) -> dict[str, Any]:
        """Collective. Quantize a copy of ``model`` to ``path`` (written by rank 0); details in JSON for every rank."""
        ...
