"""Dynamic int8: linear layers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.base import TensorSplit
from horovod_jobs.errors import ConfigError
from horovod_jobs.models.cnn import StridedCnn
from horovod_jobs.models.vit import VisionTransformer
from horovod_jobs.quantization.base import Calibration
from horovod_jobs.quantization.quantizer import DynamicInt8
from horovod_jobs.runtimes.onnx import open_session

SHAPE = (1, 12, 12)
NOTHING = Calibration(TensorSplit(torch.zeros(1, *SHAPE), torch.zeros(1)), [])


def quantize(model: nn.Module, path: Path, **settings: Any) -> dict[str, Any]:
    recipe = DynamicInt8(**settings)
    return recipe.quantize(model.eval(), input_shape=SHAPE, calibration=NOTHING, world=SingleWorld(), path=path)


def test_a_transformers_linear_layers_run_on_integers(tmp_path: Path) -> None:
    model = VisionTransformer(num_classes=4, input_shape=SHAPE, width=32, depth=2, heads=2)
    details = quantize(model, tmp_path / "m.onnx")
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert details["layers"] == {"linear": linear}
    assert details["kernels"]["integer"]["linear"] == linear
    assert details["linear_share_of_parameters"] > 0.8
    samples = torch.randn(6, *SHAPE)
    with torch.no_grad():
        expected = model(samples)
    session = open_session(tmp_path / "m.onnx", threads=1)
    for batch in (1, 6):
        found = session.run(["logits"], {"inputs": samples[:batch].numpy()})[0]
        assert np.abs(found - expected[:batch].numpy()).max() < 0.1 * expected.std()


def test_convolutions_are_untouched_and_that_is_said(tmp_path: Path) -> None:
    details = quantize(
        StridedCnn(num_classes=4, input_shape=SHAPE, widths=[8, 16], strides=[1, 2]), tmp_path / "m.onnx"
    )
    assert details["kernels"]["float"]["convolutions"] == 2
    assert "convolutions stay float32" in details["note"]
    assert "quantizer=int8_static" in details["note"]


@pytest.mark.parametrize(("per_channel", "sizes"), [(True, {16, 4}), (False, {1})])
def test_weights_have_one_scale_a_channel_or_one_in_all(tmp_path: Path, per_channel: bool, sizes: set[int]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4))
    quantize(model, tmp_path / "m.onnx", per_channel=per_channel)
    graph = onnx.load(tmp_path / "m.onnx").graph
    scales = [numpy_helper.to_array(e) for e in graph.initializer if e.name.endswith("_scale")]
    assert {scale.size for scale in scales} == sizes


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match="quantizer=int8_static"):
        quantize(model, tmp_path / "m.onnx")
