"""Residual networks for small pictures: He et al. 2015, "Deep Residual Learning", arXiv:1512.03385, section 4.2."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from horovod_jobs.errors import ConfigError
from horovod_jobs.models.shapes import image_channels


class ResNet(nn.Module):
    """ResNet of ``depth = 6n + 2`` layers: a convolution, three stages of n blocks, average pooling, one linear layer.

    The stages have ``width``, 2 ``width`` and 4 ``width`` channels; the second and third halve the picture. With width
    16, 3 input channels and 10 classes, depths 20, 32 and 56 have 0.27, 0.46 and 0.85 million parameters, the figures
    of the paper's table 6.

    Input ``[B, C, H, W]``, output logits ``[B, num_classes]``.

    Raises:
        ConfigError: a depth that is not 6n + 2, or an input that is not a picture.
    """

    def __init__(self, *, num_classes: int, input_shape: Sequence[int], depth: int = 20, width: int = 16) -> None:
        super().__init__()
        channels = image_channels(input_shape, model="ResNet")
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ConfigError(f"depth={depth} is not 6n + 2; use 8, 14, 20, 32, 44, 56 or 110")
        stem = nn.Sequential(_conv3x3(channels, width, stride=1), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(stem, *blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of pictures ``[B, C, H, W]``."""
        logits: Tensor = self.classifier(self.pool(self.blocks(inputs)).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity shortcut.

    Where the shape changes, the shortcut is the paper's option A: every second pixel, and zeros for the new channels,
    so it has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(outputs, outputs, stride=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self._stride, self._new_channels = stride, outputs - inputs

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(inputs)))))
        outputs: Tensor = self.relu2(self._shortcut(inputs) + residual)
        return outputs

    def _shortcut(self, inputs: Tensor) -> Tensor:
        if self._stride == 1 and self._new_channels == 0:
            return inputs
        before = self._new_channels // 2
        return F.pad(inputs[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, before, self._new_channels - before))


def _conv3x3(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
