"""Which tensors of a graph become integers: the annotations that torchao's PT2E turns into observers.

Every convolution and linear layer gets integer weights and inputs. An activation is quantized once, after the
activation function that a runtime fuses, so that convolution, batch norm, ReLU and residual addition run as one chain
of integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from horovod_jobs.export import known_messages_hidden

# Messages of torchao's import that say nothing about this use of it.
_IMPORT_MESSAGES = {
    # Optional GPU kernels that do not load on this CPU.
    "torchao": "Failed to load ",
    # torchao 0.18 registers its own enums the way torch 2.13 no longer needs.
    "torch.utils._pytree": "<enum 'KernelPreference'>",
}
with known_messages_hidden(_IMPORT_MESSAGES):
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )

__all__ = [
    "IntegerChains",
    "MinMaxObserver",
    "PerChannelMinMaxObserver",
    "Scheme",
    "convert_pt2e",
    "count_layers",
    "prepare_pt2e",
]

_ATEN = torch.ops.aten
_KEY = "quantization_annotation"
_EPS = 2.0**-20  # Smallest scale; a channel of zeros has no other.

CONVOLUTIONS = frozenset({_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default})
LINEAR = frozenset({_ATEN.linear.default})
FUSED = frozenset({_ATEN.relu.default, _ATEN.relu_.default})
ADDITIONS = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor})
POOLS = frozenset({_ATEN.adaptive_avg_pool2d.default, _ATEN.avg_pool2d.default})
# These move or choose values, so their output has the scale of their input.
TRANSPARENT = frozenset(
    {
        _ATEN.flatten.using_ints,
        _ATEN.view.default,
        _ATEN.reshape.default,
        _ATEN.max_pool2d.default,
        _ATEN.permute.default,
    }
)
_IDENTITIES = frozenset({_ATEN.dropout.default, _ATEN.dropout_.default, _ATEN.alias.default})


@dataclass(frozen=True)
class Scheme:
    """How values become integers.

    symmetric_activations: int8 from -127 to 127 with zero point 0, instead of uint8 from 0 to 255 with any zero point.
    per_channel: a scale for each output channel of a weight, instead of one for the whole weight.
    reduce_range: weights of 7 bits, for CPUs whose 16-bit sums of 8-bit products saturate (x86 without VNNI).
    """

    symmetric_activations: bool
    per_channel: bool
    reduce_range: bool

    def activation(self) -> Any:
        """torchao's specification of an activation."""
        observer = MinMaxObserver.with_args(eps=_EPS)
        if self.symmetric_activations:
            return QuantizationSpec(torch.int8, observer, -127, 127, torch.per_tensor_symmetric)
        return QuantizationSpec(torch.uint8, observer, 0, 255, torch.per_tensor_affine)

    def weight(self) -> Any:
        """torchao's specification of a weight; weights are always symmetric."""
        limit = 63 if self.reduce_range else 127
        if self.per_channel:
            observer = PerChannelMinMaxObserver.with_args(eps=_EPS)
            return QuantizationSpec(torch.int8, observer, -limit, limit, torch.per_channel_symmetric, ch_axis=0)
        return QuantizationSpec(
            torch.int8, MinMaxObserver.with_args(eps=_EPS), -limit, limit, torch.per_tensor_symmetric
        )


class IntegerChains(Quantizer):  # type: ignore[misc]
    """A PT2E quantizer for runtimes that fuse QuantizeLinear/DequantizeLinear pairs, such as onnxruntime and TensorRT.

    The last layer's output stays float32, and so does whatever has no integer kernel (softmax, layer norm, GELU).
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self._scheme = scheme

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Take out what does nothing in evaluation mode, so that it does not part a layer from its activation."""
        for node in list(model.graph.nodes):
            if node.op == "call_function" and node.target in _IDENTITIES:
                node.replace_all_uses_with(node.args[0])
                model.graph.erase_node(node)
        model.recompile()
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark the weights and activations that become integers."""
        weight, activation = self._scheme.weight(), self._scheme.activation()
        wanted: dict[Node, Node | None] = {}  # activation to quantize -> the one whose scale it shares
        # From the outputs up: whether a sum or a pool is worth quantizing depends on who reads it.
        for node in reversed(model.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in CONVOLUTIONS | LINEAR and _is_constant(node.args[1]):
                _annotate(node, QuantizationAnnotation(input_qspec_map={node.args[1]: weight}, _annotated=True))
                wanted.setdefault(node.args[0], None)
                if node.target in CONVOLUTIONS:
                    # An integer convolution needs an integer output; a linear layer can give float32.
                    wanted.setdefault(_fused_output(node), None)
            elif node.target in ADDITIONS and _fused_output(node) in wanted and _two_tensors(node):
                wanted.update({argument: wanted.get(argument) for argument in node.args[:2]})
            elif node.target in POOLS and node in wanted:
                wanted.setdefault(node.args[0], None)
            elif node.target in TRANSPARENT and node in wanted:
                wanted.setdefault(node.args[0], None)
                wanted[node] = node.args[0]
        for node, source in wanted.items():
            spec = activation if source is None else SharedQuantizationSpec(source)
            annotation = node.meta.get(_KEY) or QuantizationAnnotation(_annotated=True)
            annotation.output_qspec = spec
            _annotate(node, annotation)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what has no integer kernel stays float32."""


def count_layers(model: GraphModule) -> dict[str, int]:
    """How many convolutions and linear layers with constant weights a graph has."""
    return {
        "convolutions": _count(model, lambda node: node.target in CONVOLUTIONS),
        "linear": _count(model, lambda node: node.target in LINEAR),
    }


def _count(model: GraphModule, test: Callable[[Node], bool]) -> int:
    return sum(node.op == "call_function" and test(node) for node in model.graph.nodes)


def _annotate(node: Node, annotation: Any) -> None:
    node.meta[_KEY] = annotation


def _is_constant(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _two_tensors(node: Node) -> bool:
    return all(isinstance(argument, Node) and argument.op != "get_attr" for argument in node.args[:2])


def _fused_output(node: Node) -> Node:
    """The activation function that is the node's only reader, or the node itself."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target in FUSED else node
