"""Torch modules, built from config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from horovod_jobs.predict import build_module, check_inputs
from horovod_jobs.preprocessing import prepare

if TYPE_CHECKING:
    import numpy as np

    from horovod_jobs.bundle import ModelConfig


def load(config: ModelConfig, *, threads: int | None, device: str, allow_targets: Sequence[str]) -> TorchPredictor:
    """See ``Format.load``. ``threads`` sets torch's number for the whole process."""
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchPredictor(build_module(config, allow_targets=allow_targets), config, device=device)


class TorchPredictor:
    """A torch module in evaluation mode."""

    format = "torch"

    def __init__(self, module: nn.Module, config: ModelConfig, *, device: torch.device | str = "cpu") -> None:
        self.input_shape, self.num_classes = config.input_shape, config.num_classes
        self.input_dtype, self.fields = config.input_dtype, config.fields
        self.class_names, self.parameters = config.class_names, config.parameters
        self.preprocessing = config.preprocessing
        self.module = module.eval().to(device)
        self.device = device

    def prepare(self, raw: Any) -> Tensor:
        """See ``Predictor``."""
        return prepare(raw, how=self.preprocessing, input_shape=self.input_shape)

    def __call__(self, inputs: Tensor) -> Tensor:
        """See ``Predictor``."""
        check_inputs(inputs, self.input_shape, self.input_dtype)
        if len(inputs) == 0:
            return torch.empty(0, self.num_classes)
        with torch.no_grad():
            logits: Tensor = self.module(inputs.to(self.device, getattr(torch, self.input_dtype)))
        return logits.float().cpu()

    def caller(self, inputs: np.ndarray[Any, Any]) -> Callable[[], Any]:
        """See ``Predictor``."""
        tensor = torch.from_numpy(inputs).to(self.device)

        def call() -> None:
            with torch.inference_mode():
                self.module(tensor)

        return call
