"""The formats that a model is kept in. A new one is an entry of ``FORMATS``, a module here that loads it, and a backend that writes it.

The table imports nothing heavy: reading a run's figures needs the names of files and runtimes, not the runtimes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Format:
    """How a model lies in an artifact and what runs it.

    name: in config.json, and what a quantization backend says it writes.
    file: of the model; ``beside``: further files without which it cannot be loaded.
    runtime: what runs it, as tables name it.
    module: has ``load(config, *, threads, device, allow_targets) -> Predictor``. Importing it brings the runtime into memory, which
        is not counted as the model's.
    """

    name: str
    file: str
    runtime: str
    module: str
    beside: tuple[str, ...] = ()

    def import_runtime(self) -> None:
        """Bring the runtime into memory."""
        importlib.import_module(self.module)

    def load(
        self, config: Any, *, threads: int | None = None, device: str = "cpu", allow_targets: Sequence[str] = ()
    ) -> Any:
        """The ``Predictor`` of a ``ModelConfig``. ``threads`` None: as torch has it.

        Raises:
            ArtifactError: the file is missing, damaged, or does not fit.
            ConfigError: a device or a ``_target_`` that cannot be used.
            SetupError: the runtime is not installed.
        """
        module: Any = importlib.import_module(self.module)
        return module.load(config, threads=threads, device=device, allow_targets=allow_targets)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("torch", file="model.safetensors", runtime="torch", module="horovod_jobs.runtimes.pytorch"),
        Format("onnx", file="model.onnx", runtime="onnxruntime", module="horovod_jobs.runtimes.onnx"),
    )
}


def runtime_of(name: str) -> str:
    """What runs a model of this format; the format's own name where it is of another version."""
    return FORMATS[name].runtime if name in FORMATS else name
