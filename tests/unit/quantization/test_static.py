"""Static int8: what the scheme makes of the graph, and that onnxruntime runs it on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.base import TensorSplit
from horovod_jobs.errors import ConfigError, NonFiniteError
from horovod_jobs.models.cnn import StridedCnn
from horovod_jobs.models.resnet import ResNet
from horovod_jobs.quantization.base import Calibration
from horovod_jobs.quantization.quantizer import StaticInt8
from horovod_jobs.runtimes.onnx import open_session

SHAPE = (1, 12, 12)


def inputs(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def cnn(**settings: Any) -> nn.Module:
    return trained(StridedCnn(num_classes=4, input_shape=SHAPE, widths=[8, 16], strides=[1, 2], **settings))


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, so that folding them matters."""
    with torch.no_grad():
        for _ in range(5):
            model(inputs(64) * 2 + 0.3)
    return model.eval()


def quantize(
    model: nn.Module, path: Path, *, samples: Tensor | None = None, **settings: Any
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    samples = inputs(128, seed=1) if samples is None else samples
    split = TensorSplit(samples, torch.zeros(len(samples)))
    calibration = Calibration(split, list(torch.arange(len(samples)).split(32)))
    details = StaticInt8(**settings).quantize(
        model, input_shape=SHAPE, calibration=calibration, world=SingleWorld(), path=path
    )
    return onnx.load(path), details


def parameters(model: onnx.ModelProto, operator: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scale and zero point of every node of an operator."""
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    return [
        (constants[node.input[1]], constants[node.input[2]]) for node in model.graph.node if node.op_type == operator
    ]


def outputs(path: Path, samples: Tensor) -> Tensor:
    return torch.from_numpy(open_session(path, threads=1).run(["logits"], {"inputs": samples.numpy()})[0])


def test_asymmetric_activations_use_the_whole_range(tmp_path: Path) -> None:
    model, details = quantize(cnn(), tmp_path / "m.onnx")
    zeros = [int(zero) for _, zero in parameters(model, "QuantizeLinear")]
    assert all(zero.dtype == np.uint8 for _, zero in parameters(model, "QuantizeLinear"))
    assert 100 < zeros[0] < 156, "inputs are on both sides of zero"
    assert set(zeros[1:]) == {0}, "what follows a ReLU starts at zero"
    assert details["activations"] == "uint8 asymmetric"


def test_symmetric_activations_have_zero_point_zero(tmp_path: Path) -> None:
    model, _ = quantize(cnn(), tmp_path / "m.onnx", symmetric_activations=True)
    activations = parameters(model, "QuantizeLinear")
    assert len(activations) >= 4
    assert all(zero.dtype == np.int8 and not zero.any() for _, zero in activations)


@pytest.mark.parametrize(("per_channel", "shapes"), [(True, {(8,), (16,), (4,)}), (False, {()})])
def test_weights_have_one_scale_a_channel_or_one_in_all(
    tmp_path: Path, per_channel: bool, shapes: set[tuple[int, ...]]
) -> None:
    model, _ = quantize(cnn(), tmp_path / "m.onnx", per_channel=per_channel)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    weights = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and constants[node.input[0]].ndim > 1
    ]
    assert len(weights) == 3
    assert {constants[node.input[1]].shape for node in weights} == shapes
    assert all(not constants[node.input[2]].any() for node in weights), "weights are symmetric"


def test_reduced_range_keeps_weights_within_seven_bits(tmp_path: Path) -> None:
    largest = {}
    for reduced in (False, True):
        model, _ = quantize(cnn(), tmp_path / "m.onnx", reduce_range=reduced)
        weights = [numpy_helper.to_array(e) for e in model.graph.initializer if e.data_type == onnx.TensorProto.INT8]
        largest[reduced] = max(int(np.abs(weight).max()) for weight in weights)
    assert largest == {False: 127, True: 63}


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_layer_runs_on_integers(tmp_path: Path, symmetric: bool) -> None:
    _, details = quantize(cnn(), tmp_path / "m.onnx", symmetric_activations=symmetric)
    kernels = details["kernels"]
    assert kernels["float"] == {"convolutions": 0, "linear": 0}
    assert (kernels["integer"]["convolutions"], kernels["integer"]["linear"]) == (2, 1)
    assert details["layers"] == {"convolutions": 2, "linear": 1}


@pytest.mark.parametrize("symmetric", [False, True])
def test_residual_additions_run_on_integers(tmp_path: Path, symmetric: bool) -> None:
    model = trained(ResNet(num_classes=4, input_shape=SHAPE, depth=8))
    _, details = quantize(model, tmp_path / "m.onnx", symmetric_activations=symmetric)
    assert details["kernels"]["operators"]["QLinearAdd"] == 3
    assert details["kernels"]["float"] == {"convolutions": 0, "linear": 0}
    assert details["kernels"]["integer"]["convolutions"] == 7


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("batch", [1, 7])
def test_outputs_stay_close_to_the_float_model(tmp_path: Path, symmetric: bool, separable: bool, batch: int) -> None:
    model = cnn(separable=separable)
    samples = inputs(batch, seed=1)
    with torch.no_grad():
        expected = model(samples)
    quantize(model, tmp_path / "m.onnx", symmetric_activations=symmetric)
    found = outputs(tmp_path / "m.onnx", samples)
    difference = (found - expected).abs().max()
    assert 0 < difference < 0.1 * expected.std(), "close, and not the float model itself"


def test_the_original_model_is_left_alone(tmp_path: Path) -> None:
    model = cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(inputs(5))
        quantize(model, tmp_path / "m.onnx")
        assert torch.equal(model(inputs(5)), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_float_weights_are_not_left_in_the_file(tmp_path: Path) -> None:
    model, details = quantize(cnn(), tmp_path / "m.onnx")
    used = {name for node in model.graph.node for name in node.input}
    assert {entry.name for entry in model.graph.initializer} <= used
    floats = [entry for entry in model.graph.initializer if entry.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(entry.dims, dtype=int) for entry in floats) <= 16, "scales only"
    assert details["onnx_bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 convolutions and linear layers"):
        quantize(nn.Sequential(nn.Flatten(), nn.Softmax(1)), tmp_path / "m.onnx")


def test_calibration_on_nan_is_refused(tmp_path: Path) -> None:
    samples = inputs(64)
    samples[3, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        quantize(cnn(), tmp_path / "m.onnx", samples=samples)


class BranchesOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out if float(x.sum()) > 0 else -out


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BranchesOnValues cannot be exported for a batch of any size"):
        quantize(BranchesOnValues().eval(), tmp_path / "m.onnx")
