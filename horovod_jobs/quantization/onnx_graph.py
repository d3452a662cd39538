"""Rewrites of a quantized ONNX graph for onnxruntime's integer kernels; none changes a value by more than rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


class _Graph:
    """Who makes and who reads each value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.constants = {entry.name: entry for entry in self.proto.initializer}
        self.producer = {name: node for node in self.proto.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """A constant's values, or None for anything else."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def made_by(self, name: str, operator: str) -> onnx.NodeProto | None:
        node = self.producer.get(name)
        return node if node is not None and node.op_type == operator else None

    def only_reader(self, name: str, operator: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None

    def add_constant(self, name: str, values: np.ndarray[Any, Any]) -> None:
        from onnx import numpy_helper

        self.proto.initializer.append(numpy_helper.from_array(values, name))


def finish(model: onnx.ModelProto) -> None:
    """Apply all rewrites in place."""
    quantize_biases(model)
    name_global_pools(model)
    split_symmetric_activations(model)
    part_symmetric_readers(model)
    prune(model)


def quantize_biases(model: onnx.ModelProto) -> int:
    """Store biases of integer layers as int32 at scale (input scale x weight scale); how many were.

    Without it onnxruntime runs a Gemm in float32. A bias that does not fit in 32 bits stays float32.
    """
    from onnx import helper

    graph = _Graph(model)
    done = 0
    for node in list(graph.proto.node):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        source, weight = (graph.made_by(name, "DequantizeLinear") for name in node.input[:2])
        bias = graph.value(node.input[2])
        if source is None or weight is None or bias is None:
            continue
        scales = graph.value(source.input[1]), graph.value(weight.input[1])
        if scales[0] is None or scales[1] is None:
            continue
        scale = (scales[0].astype(np.float64) * scales[1].astype(np.float64)).reshape(-1)
        integers = np.rint(bias.astype(np.float64) / scale)
        if np.abs(integers).max(initial=0) > np.iinfo(np.int32).max:
            continue
        name = f"{node.output[0]}.bias"
        if scale.size == 1:
            scale = scale.reshape(())
        graph.add_constant(f"{name}.int32", integers.astype(np.int32))
        graph.add_constant(f"{name}.scale", scale.astype(np.float32))
        graph.add_constant(f"{name}.zero", np.zeros(scale.shape, np.int32))
        inputs = [f"{name}.int32", f"{name}.scale", f"{name}.zero"]
        dequantize = helper.make_node("DequantizeLinear", inputs, [name], **({"axis": 0} if scale.ndim else {}))
        graph.proto.node.insert(0, dequantize)
        node.input[2] = name
        done += 1
    return done


def name_global_pools(model: onnx.ModelProto) -> int:
    """Call the mean over both sides of a picture GlobalAveragePool, which has an integer kernel; how many were."""
    graph = _Graph(model)
    done = 0
    for node in graph.proto.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2:
            continue
        axes = graph.value(node.input[1])
        keeps = all(entry.i == 1 for entry in node.attribute if entry.name == "keepdims")
        between = graph.made_by(node.input[0], "DequantizeLinear") and graph.only_reader(
            node.output[0], "QuantizeLinear"
        )
        # Only a pool over [B, C, H, W] is quantized on both sides (annotation.POOLS).
        if axes is not None and keeps and between and sorted(int(axis) % 4 for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            node.ClearField("attribute")
            done += 1
    return done


def split_symmetric_activations(model: onnx.ModelProto) -> int:
    """Quantize before a ReLU, and not only after it, where the zero point is not the smallest integer; how many were.

    With uint8 and zero point 0 the ReLU is the lower bound of the integers and costs nothing. With symmetric int8 it is
    not, and onnxruntime would run the layer in float32. A pair of the same scale before the ReLU gives the same
    values: what is below its range is negative, and ReLU makes it 0.
    """
    from onnx import helper

    graph = _Graph(model)
    done = 0
    for relu in list(graph.proto.node):
        quantize = graph.only_reader(relu.output[0], "QuantizeLinear") if relu.op_type == "Relu" else None
        layer = graph.producer.get(relu.input[0])
        if quantize is None or layer is None or layer.op_type not in ("Conv", "Add", "Gemm"):
            continue
        zero = graph.value(quantize.input[2])
        if zero is None or zero.dtype != np.int8 or zero.any() or len(graph.readers[relu.input[0]]) != 1:
            continue
        name = f"{relu.input[0]}.clipped"
        parameters = list(quantize.input[1:])
        pair = [
            helper.make_node("QuantizeLinear", [relu.input[0], *parameters], [f"{name}.int8"]),
            helper.make_node("DequantizeLinear", [f"{name}.int8", *parameters], [name]),
        ]
        relu.input[0] = name
        position = list(graph.proto.node).index(relu)
        for offset, node in enumerate(pair):
            graph.proto.node.insert(position + offset, node)
        done += 1
    return done


def part_symmetric_readers(model: onnx.ModelProto) -> int:
    """Give each reader of an int8 activation a quantize/dequantize pair of its own; how many were added.

    onnxruntime's x86 kernels take uint8 activations; it shifts int8 ones, but only where a pair has one reader, and
    would run the layers around any other pair in float32.
    """
    from onnx import helper

    graph = _Graph(model)
    done = 0
    for dequantize in list(graph.proto.node):
        quantize = (
            graph.made_by(dequantize.input[0], "QuantizeLinear") if dequantize.op_type == "DequantizeLinear" else None
        )
        zero = graph.value(quantize.input[2]) if quantize is not None else None
        if quantize is None or zero is None or zero.dtype != np.int8:
            continue
        output = dequantize.output[0]
        for number, reader in enumerate(graph.readers.get(output, [])[1:], start=1):
            name = f"{output}.reader{number}"
            pair = [
                helper.make_node("QuantizeLinear", list(quantize.input), [f"{name}.int8"]),
                helper.make_node("DequantizeLinear", [f"{name}.int8", *dequantize.input[1:]], [name]),
            ]
            reader.input[list(reader.input).index(output)] = name
            position = list(graph.proto.node).index(dequantize) + 1
            for offset, node in enumerate(pair):
                graph.proto.node.insert(position + offset, node)
            done += 1
    return done


def prune(model: onnx.ModelProto) -> None:
    """Remove constants that nothing reads: the float weights that integer ones replaced."""
    used = {name for node in model.graph.node for name in node.input} | {entry.name for entry in model.graph.output}
    kept = [entry for entry in model.graph.initializer if entry.name in used]
    if len(kept) != len(model.graph.initializer):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        model.graph.ClearField("initializer")
        model.graph.initializer.extend(copies)
