"""onnxruntime on the CPU: QuantizeLinear/DequantizeLinear ONNX that it fuses into integer kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horovod_jobs.errors import ConfigError
from horovod_jobs.export import capture, known_messages_hidden, strip, to_onnx, write_onnx
from horovod_jobs.quantization.base import DynamicScheme, Program
from horovod_jobs.quantization.onnx_graph import finish
from horovod_jobs.runtimes.onnx import open_session

if TYPE_CHECKING:
    import onnx

# Kernels that a float layer becomes, in onnxruntime's optimised graph.
INTEGER_KERNELS = {
    "convolutions": ("QLinearConv", "ConvInteger"),
    "linear": ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"),
    "other": ("QLinearAdd", "QLinearGlobalAveragePool", "QLinearAveragePool", "NhwcMaxPool"),
}
FLOAT_KERNELS = {"convolutions": ("Conv", "FusedConv"), "linear": ("Gemm", "FusedGemm", "MatMul", "FusedMatMul")}


class OnnxRuntime:
    """Writes model.onnx for onnxruntime's CPU kernels and counts the integer kernels that it really runs."""

    name = "onnxruntime"
    format = "onnx"

    def write(self, program: Program, path: Path) -> dict[str, Any]:
        """See ``Backend``."""
        example = torch.zeros(2, *program.input_shape, dtype=program.input_dtype)
        if program.dynamic is None:
            model = to_onnx(capture(program.module, example, owned=True))
            finish(model)
        else:
            model = _dynamic(to_onnx(capture(program.module, example)), program.dynamic)
        write_onnx(model, path)
        return {"kernels": count_kernels(path), "onnx_bytes": path.stat().st_size}


def count_kernels(path: Path) -> dict[str, Any]:
    """What onnxruntime runs here: ``integer`` and ``float`` layers by kind, and every operator of its optimised graph."""
    import onnx

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        open_session(path, threads=1, optimized=optimized)
        operators = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    integer = {kind: sum(operators[name] for name in names) for kind, names in INTEGER_KERNELS.items()}
    floating = {kind: sum(operators[name] for name in names) for kind, names in FLOAT_KERNELS.items()}
    return {"integer": integer, "float": floating, "operators": dict(sorted(operators.items()))}


def _dynamic(model: onnx.ModelProto, scheme: DynamicScheme) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "float.onnx", Path(directory) / "int8.onnx"
        onnx.save(model, source)
        # It asks for a pre-processing that only static quantization of its own gains from.
        with known_messages_hidden({"root": "Please consider to run pre-processing"}):
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul"],  # A Gemm is turned into MatMul and Add first.
                per_channel=scheme.per_channel,
                reduce_range=scheme.reduce_range,
                weight_type=QuantType.QInt8,
            )
        quantized = onnx.load(target)
    strip(quantized)
    if not any(node.op_type == "MatMulInteger" for node in quantized.graph.node):
        raise ConfigError(
            "none of the model's linear layers can be quantized dynamically (0 found); use quantizer=int8_static"
        )
    return quantized
