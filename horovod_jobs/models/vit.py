"""A small vision transformer: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horovod_jobs.errors import ConfigError
from horovod_jobs.models.shapes import image_channels


class VisionTransformer(nn.Module):
    """Square patches, a class token, learned positions, pre-norm encoder blocks, and a linear layer on the class token.

    Input ``[B, C, H, W]``, output logits ``[B, num_classes]``.

    Raises:
        ConfigError: patches that do not tile the picture, or a ``width`` that does not divide by ``heads``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        patch: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = image_channels(input_shape, model="VisionTransformer")
        height, breadth = input_shape[1:]
        if patch < 1 or height % patch or breadth % patch:
            raise ConfigError(
                f"patch={patch} does not tile pictures of {height}x{breadth}; use a divisor of both sides"
            )
        if heads < 1 or width % heads:
            raise ConfigError(f"width={width} does not divide by heads={heads}; use a multiple of the heads")
        tokens = (height // patch) * (breadth // patch) + 1
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))
        self.dropout = nn.Dropout(dropout)
        hidden = round(width * mlp_ratio)
        self.blocks = nn.Sequential(
            *(EncoderBlock(width, heads=heads, hidden=hidden, dropout=dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of pictures ``[B, C, H, W]``."""
        patches = self.embed(inputs).flatten(2).transpose(1, 2)  # [B, tokens - 1, width]
        first = self.class_token.expand(patches.shape[0], -1, -1)
        tokens = self.dropout(torch.cat([first, patches], dim=1) + self.positions)
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens))[:, 0])
        return logits


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on ``[B, T, width]``."""

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads=heads)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        attended = inputs + self.dropout1(self.attention(self.norm1(inputs)))
        outputs: Tensor = attended + self.dropout2(self.mlp(self.norm2(attended)))
        return outputs


class SelfAttention(nn.Module):
    """Multi-head self-attention on ``[B, T, width]``: linear layers and one fused product.

    Hand-written, because ``nn.MultiheadAttention`` hides its projections from quantization and takes a fast path that
    is not exported.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self._heads, self._head_width = heads, width // heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        parts = self.query_key_value(inputs).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self._heads, self._head_width)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, T, width / heads]
        joined: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return joined
