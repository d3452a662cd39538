"""Small strided convolutional networks: a teacher and students of the same family."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from horovod_jobs.errors import ConfigError
from horovod_jobs.models.shapes import image_channels


class StridedCnn(nn.Module):
    """Conv-BN-ReLU blocks that shrink the picture by their strides, then average pooling and one linear layer.

    ``widths[i]`` and ``strides[i]`` are the channels and the stride of block i. With ``separable=True`` every block but
    the first is a depthwise 3x3 convolution followed by a pointwise one (Howard et al. 2017, arXiv:1704.04861), each
    with its batch norm and ReLU: about a ninth of the weights, but not a ninth of the time on a CPU.

    Input ``[B, C, H, W]``, output logits ``[B, num_classes]``.

    Raises:
        ConfigError: lists of different or zero length, values below 1, or an input that is not a picture.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        separable: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = image_channels(input_shape, model="StridedCnn")
        if not widths or len(widths) != len(strides) or min((*widths, *strides)) < 1:
            raise ConfigError(
                f"widths={list(widths)} and strides={list(strides)} must be lists of the same length, at least 1, "
                "of whole numbers from 1 on; give one stride for each width"
            )
        blocks: list[nn.Module] = [conv_bn_relu(channels, widths[0], stride=strides[0])]
        for (inputs, outputs), stride in zip(pairwise(widths), strides[1:], strict=True):
            if separable:
                blocks.append(conv_bn_relu(inputs, inputs, stride=stride, groups=inputs))
                blocks.append(conv_bn_relu(inputs, outputs, kernel=1))
            else:
                blocks.append(conv_bn_relu(inputs, outputs, stride=stride))
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of pictures ``[B, C, H, W]``."""
        features = self.pool(self.blocks(inputs)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(features))
        return logits


def conv_bn_relu(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, batch norm and ReLU; He initialisation (arXiv:1502.01852)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
