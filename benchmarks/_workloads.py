"""The models that ``peer_ddp`` trains, with synthetic inputs: the step's time does not depend on what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horovod_jobs.models.resnet import ResNet


class Gpt(nn.Module):
    """A decoder-only transformer with pre-norm blocks and tied embeddings (Radford et al. 2019). ``[B, T]`` -> ``[B, T, V]``."""

    def __init__(self, *, vocabulary: int = 8192, length: int = 64, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[_Block(width, heads=width // 64) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(hidden)), self.tokens.weight)


class _Block(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.qkv(self.norm1(hidden)).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp(self.norm2(hidden))


@dataclass(frozen=True)
class Workload:
    """A model, its optimizer, and one rank's synthetic batch (inputs, targets)."""

    title: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]


def _pictures(generator: torch.Generator, *, samples: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, *shape, generator=generator), torch.randint(10, (samples,), generator=generator)


def _text(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(8192, (8, 65), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4)


def _wide_mlp() -> nn.Module:
    sizes = (784, 3072, 3072, 3072)
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


WORKLOADS: dict[str, Workload] = {
    "resnet20": Workload(
        "ResNet-20, 32 x 3x32x32, SGD",
        lambda: ResNet(num_classes=10, input_shape=(3, 32, 32), depth=20),
        _sgd,
        lambda generator: _pictures(generator, samples=32, shape=(3, 32, 32)),
    ),
    "gpt": Workload("GPT 4 x 256, 8 x 64 tokens, AdamW", Gpt, _adamw, _text),
    "mlp": Workload(
        "MLP 784-3072-3072-3072-10, batch 16, SGD",
        _wide_mlp,
        _sgd,
        lambda generator: _pictures(generator, samples=16, shape=(1, 28, 28)),
    ),
}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over the batch's samples or tokens."""
    outputs = model(batch[0])
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())
