"""Mixed precision: autocast, and loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from horovod_jobs.comm.world import World
from horovod_jobs.config import FitConfig
from horovod_jobs.errors import ConfigError, SetupError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Weights stay fp32; with bf16 or fp16 the forward pass runs under autocast. fp16 also scales the loss."""

    def __init__(self, name: str, *, device: torch.device) -> None:
        self._dtype = _DTYPES.get(name)
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the forward pass and the loss."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What to call ``backward`` on."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, updater: Any) -> None:
        """After the exchange and before clipping."""
        if self._scaler is not None:
            self._scaler.unscale_(updater)

    def step(self, updater: Any) -> None:
        """Update, unless fp16 gradients overflowed: after the exchange they are the same on all ranks, so all skip together."""
        if self._scaler is None:
            updater.step()
        else:
            self._scaler.step(updater)
            self._scaler.update()

    def state(self) -> dict[str, Any]:
        return {} if self._scaler is None else self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)


def choose_device(name: str, *, local_rank: int) -> torch.device:
    """``auto`` takes this rank's GPU where there is one.

    Raises:
        SetupError: cuda was asked for and is not there.
        ConfigError: more ranks on this host than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SetupError(
            "fit.device=cuda, and torch sees no GPU here; use fit.device=cpu, or install a CUDA build of torch"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this host has {torch.cuda.device_count()} GPUs and a rank {local_rank}; start one rank a GPU, or use fit.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def place(objective: Any, *, config: FitConfig, world: World) -> torch.device:
    """Move an objective to this rank's device and memory layout, and compile its model where asked."""
    device = choose_device(config.device, local_rank=world.local_rank)
    objective.to(device)
    if config.channels_last:
        objective.to(memory_format=torch.channels_last)
    if config.compile:
        objective.model.compile()
    return device
