"""What was published of Horovod on 512 GPUs and what the scale model needs of those networks and GPUs, each with its source.

- The runs: Sergeev & Del Balso 2018, arXiv:1802.05799, and Horovod's ``docs/benchmarks``: 128 servers with 4 Pascal GPUs each, joined by
  25 Gbit/s; TCP by NCCL 2; tf_cnn_benchmarks, 64 images a GPU; scaling efficiency 90 % (Inception V3, ResNet-101) and 68 % (VGG-16).
- Images a second of one Pascal GPU (Tesla P100, synthetic data, batch 64): TensorFlow's performance guide of May 2017
  (``docs_src/performance/benchmarks.md``): Inception V3 142, ResNet-50 219, ResNet-152 91.8, VGG-16 154. ResNet-101 is not in it: its time
  an image is interpolated between ResNet-50's and ResNet-152's by their multiply-adds (He et al. 2015, arXiv:1512.03385, table 1).
- Layers: VGG-16 from Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D; ResNet-101 from He et al. 2015, table 1; both are counted
  below. Inception V3 (Szegedy et al. 2015, arXiv:1512.00567) has 23.8 M parameters; they are spread evenly over 94 convolutions,
  with the classifier (2048 x 1000) after them. Its real early layers are slower and smaller, which hides more of the exchange.
- Horovod of that time fused up to 64 MiB and had a cycle of 5 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._scaling import Layer

WORKERS = 512
RATE_MBIT = 25_000.0
BATCH = 64
FUSION_BYTES = 64 * 1024 * 1024
CYCLE_S = 0.005

_IMAGES_PER_S = {"ResNet-50": 219.0, "ResNet-152": 91.8, "Inception V3": 142.0, "VGG-16": 154.0}
_MULTIPLY_ADDS = {"ResNet-50": 3.8e9, "ResNet-101": 7.6e9, "ResNet-152": 11.3e9}
_INCEPTION_PARAMETERS, _INCEPTION_CONVOLUTIONS = 23_834_568, 94


@dataclass(frozen=True)
class Published:
    """One network of the paper."""

    name: str
    layers: tuple[Layer, ...]  # first to last
    images_per_s: float  # of one GPU
    efficiency: float  # of 512 workers, published

    @property
    def parameters(self) -> int:
        return sum(count for count, _ in self.layers)

    @property
    def compute_s(self) -> float:
        """A step of one GPU alone."""
        return BATCH / self.images_per_s


def vgg16_layers() -> list[Layer]:
    """Configuration D for 224 x 224 pictures: weights and biases of 13 convolutions and 3 linear layers."""
    layers: list[Layer] = []
    channels, side = 3, 224
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [(9 * channels * width, 9.0 * channels * width * side * side), (width, 0.0)]
            channels = width
        side //= 2
    for inputs, outputs in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)):
        layers += [(inputs * outputs, float(inputs * outputs)), (outputs, 0.0)]
    return layers


def resnet_layers(blocks: Sequence[int]) -> list[Layer]:
    """Bottleneck residual network for 224 x 224 pictures; ``[3, 4, 23, 3]`` is ResNet-101. Batch norm has two tensors."""
    layers: list[Layer] = []

    def convolution(inputs: int, outputs: int, kernel: int, side: int) -> None:
        weights = kernel * kernel * inputs * outputs
        layers.extend([(weights, float(weights * side * side)), (outputs, 0.0), (outputs, 0.0)])

    convolution(3, 64, 7, 112)
    channels = 64
    for stage, repeats in enumerate(blocks):
        width, side = 64 * 2**stage, 56 // 2**stage
        for block in range(repeats):
            convolution(channels, width, 1, side)
            convolution(width, width, 3, side)
            convolution(width, 4 * width, 1, side)
            if block == 0:
                convolution(channels, 4 * width, 1, side)
            channels = 4 * width
    layers += [(channels * 1000, float(channels * 1000)), (1000, 0.0)]
    return layers


def _inception_layers() -> list[Layer]:
    classifier = 2048 * 1000 + 1000
    each = (_INCEPTION_PARAMETERS - classifier) // _INCEPTION_CONVOLUTIONS
    first = _INCEPTION_PARAMETERS - classifier - each * (_INCEPTION_CONVOLUTIONS - 1)
    return [(first, 1.0), *[(each, 1.0)] * (_INCEPTION_CONVOLUTIONS - 1), (classifier, 0.0)]


def resnet101_images_per_s() -> float:
    """Interpolated as the module says."""
    low, high = 1 / _IMAGES_PER_S["ResNet-50"], 1 / _IMAGES_PER_S["ResNet-152"]
    share = (_MULTIPLY_ADDS["ResNet-101"] - _MULTIPLY_ADDS["ResNet-50"]) / (
        _MULTIPLY_ADDS["ResNet-152"] - _MULTIPLY_ADDS["ResNet-50"]
    )
    return 1 / (low + share * (high - low))


PUBLISHED = (
    Published("Inception V3", tuple(_inception_layers()), _IMAGES_PER_S["Inception V3"], 0.90),
    Published("ResNet-101", tuple(resnet_layers((3, 4, 23, 3))), resnet101_images_per_s(), 0.90),
    Published("VGG-16", tuple(vgg16_layers()), _IMAGES_PER_S["VGG-16"], 0.68),
)
