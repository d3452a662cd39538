"""A model, a data set, a loss and an optimizer that horovod_jobs has never heard of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Waves(Dataset[tuple[Tensor, int]]):
    """Noisy sine waves of 32 points; the class is the wave's frequency. Any map-style data set of (input, target) pairs will do."""

    def __init__(self, samples: int, *, classes: int, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._classes = torch.randint(classes, (samples,), generator=generator)
        phase = torch.rand(samples, 1, generator=generator) / 2
        time = torch.linspace(0, 2 * torch.pi, 32)
        clean = torch.sin(time * (self._classes[:, None] + 1) + phase)
        self._waves = clean + noise * torch.randn(clean.shape, generator=generator)

    def __len__(self) -> int:
        return len(self._waves)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._waves[index], int(self._classes[index])


class WaveData:
    """What `data:` builds: an object with `train` and `test`, and here also `validation` and the names of the classes."""

    def __init__(self, *, samples: int = 600, classes: int = 3, noise: float = 0.3) -> None:
        self.train = Waves(samples, classes=classes, noise=noise, seed=1)
        self.validation = Waves(samples // 5, classes=classes, noise=noise, seed=2)
        self.test = Waves(samples // 5, classes=classes, noise=noise, seed=3)
        self.num_classes = classes
        self.class_names = [f"{number + 1} Hz" for number in range(classes)]


class WaveNet(nn.Module):
    """What `model:` builds. `num_classes` and `input_shape` come from the data set, for a model that takes them."""

    def __init__(self, *, width: int, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        (points,) = input_shape
        self.layers = nn.Sequential(nn.Linear(points, width), nn.Tanh(), nn.Linear(width, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


class FocalLoss:
    """What a stage's `loss:` builds: called with the model's outputs [B, C] and the batch, it gives a loss per sample [B].

    Lin et al. 2017, arXiv:1708.02002, equation 4, without the class weights.
    """

    def __init__(self, *, gamma: float = 2.0) -> None:
        self._gamma = gamma

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        log_p = outputs.log_softmax(dim=1).gather(1, batch.targets[:, None]).squeeze(1)
        return -((1 - log_p.exp()) ** self._gamma) * log_p


class SignDescent(torch.optim.Optimizer):
    """What `optimizer:` builds: a step of `lr` against the sign of a running mean of the gradient.

    Bernstein et al. 2018, arXiv:1802.04434. Any torch optimizer will do; `params` comes from the stage.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.sub_(mean.sign(), alpha=group["lr"])
