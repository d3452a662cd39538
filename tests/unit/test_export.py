"""ONNX export: the same outputs for any batch, and a gate that can fail."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from horovod_jobs.errors import ConfigError, GateError
from horovod_jobs.export import capture, export_onnx, known_messages_hidden
from horovod_jobs.models.vit import VisionTransformer
from horovod_jobs.runtimes.onnx import open_session
from horovod_jobs.stages.export import check_tolerance, onnx_difference
from tests.support import SmallNet


def test_onnx_gives_torchs_outputs_for_any_batch(tmp_path: Path) -> None:
    model = VisionTransformer(num_classes=3, input_shape=(1, 8, 8), width=24, depth=1, heads=2).eval()
    export_onnx(model, tmp_path / "m.onnx", input_shape=(1, 8, 8))
    session = open_session(tmp_path / "m.onnx", threads=1)
    for batch in (1, 3, 64):
        inputs = torch.randn(batch, 1, 8, 8)
        found = session.run(["logits"], {"inputs": inputs.numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(inputs), rtol=0, atol=1e-5)


def test_a_training_model_is_exported_for_evaluation_and_left_training(tmp_path: Path) -> None:
    model = SmallNet(num_classes=3, input_shape=(1, 6, 6), dropout=0.5)
    export_onnx(model, tmp_path / "m.onnx", input_shape=(1, 6, 6))
    assert model.training
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "Dropout" not in operators


def test_the_file_has_no_trace_of_the_exporter(tmp_path: Path) -> None:
    export_onnx(SmallNet(num_classes=3, input_shape=(1, 6, 6)), tmp_path / "m.onnx", input_shape=(1, 6, 6))
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_another_model_is_noticed(tmp_path: Path) -> None:
    model = SmallNet(num_classes=3, input_shape=(1, 6, 6)).eval()
    export_onnx(model, tmp_path / "m.onnx", input_shape=(1, 6, 6))
    samples = torch.randn(70, 1, 6, 6)
    same = onnx_difference(model, tmp_path / "m.onnx", samples)
    check_tolerance(same, tolerance=1e-4, stage="export")
    with torch.no_grad():
        model.head.bias[1] += 0.25
    other = onnx_difference(model, tmp_path / "m.onnx", samples)
    assert other == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(GateError, match=r"up to 0\.25.*tolerance=0\.0001.*stages\.export\.tolerance"):
        check_tolerance(other, tolerance=1e-4, stage="export")


def test_nan_is_not_taken_for_equal(tmp_path: Path) -> None:
    model = SmallNet(num_classes=3, input_shape=(1, 6, 6)).eval()
    export_onnx(model, tmp_path / "m.onnx", input_shape=(1, 6, 6))
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert onnx_difference(model, tmp_path / "m.onnx", torch.randn(2, 1, 6, 6)) == float("inf")


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 36)


def test_a_model_for_one_batch_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="FixedBatch cannot be exported for a batch of any size"):
        capture(FixedBatch(), torch.zeros(2, 1, 6, 6))


def test_only_the_known_message_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.noise")
    with known_messages_hidden({"tests.noise": "known"}):
        logger.warning("known and harmless")
        logger.warning("something else")
    logger.warning("known, outside")
    assert [record.getMessage() for record in caplog.records] == ["something else", "known, outside"]
