"""A backend with a file and a runtime of its own: one entry in the table of formats is all that the rest has to know of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_jobs.artifacts import Artifact
from horovod_jobs.bundle import ModelConfig, read_config
from horovod_jobs.config import ExportStage, QuantizeStage
from horovod_jobs.errors import ArtifactError, ConfigError
from horovod_jobs.latency import main as latency
from horovod_jobs.predict import load as load_model
from horovod_jobs.predict import save_model
from horovod_jobs.quantization.base import Program
from horovod_jobs.quantization.onnx_backend import OnnxRuntime
from horovod_jobs.quantization.quantizer import DynamicInt8, StaticInt8
from horovod_jobs.runtimes import FORMATS, Format
from horovod_jobs.runtimes.onnx import OnnxPredictor
from horovod_jobs.stages import export, quantize
from tests.support import SMALL_NET, SmallNet, blob_data, context

RECIPE = {
    "_target_": "horovod_jobs.quantization.quantizer.StaticInt8",
    "backend": {"_target_": f"{__name__}.Backend"},
}


class Backend:
    """Writes ``model.other`` and, beside it, ``model.notes``."""

    name, format = "other", "other"

    def write(self, program: Program, path: Path) -> dict[str, Any]:
        path.with_suffix(".notes").write_text("belongs to it\n")
        return OnnxRuntime().write(program, path)


class Predictor(OnnxPredictor):
    format = "other"


def load(config: ModelConfig, *, threads: int | None, device: str, allow_targets: Sequence[str]) -> Predictor:
    assert (config.directory / "model.notes").is_file()
    return Predictor(config, threads=threads or 1)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    torch.manual_seed(0)
    net = SmallNet(num_classes=3, input_shape=(1, 6, 6))
    ctx = context(tmp_path, name="model")
    save_model(
        ctx.staging, net, model_node=SMALL_NET, num_classes=3, input_shape=(1, 6, 6), class_names=("a", "b", "c")
    )
    return ctx.store.publish(ctx.staging, kind="model", fingerprint="ab" * 32, meta={})


def quantized(directory: Path, model: Artifact) -> Artifact:
    ctx = context(directory, inputs={"model": model}, name="int8", data=blob_data(400))
    quantize.run(ctx, QuantizeStage(seed=0, quantizer=RECIPE, calibration_samples=96, max_drop=None))
    return ctx.store.publish(ctx.staging, kind="quantized", fingerprint="cd" * 32, meta={})


def test_a_format_is_one_entry(
    tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    form = Format("other", file="model.other", runtime="other runtime", module=__name__, beside=("model.notes",))
    monkeypatch.setitem(FORMATS, "other", form)
    artifact = quantized(tmp_path, model)
    assert {"config.json", "model.other", "model.notes"} <= set(artifact.files)
    for path in (artifact.path, artifact.path / "model.other"):
        assert read_config(path).format == "other"
        predictor = load_model(path)
        assert predictor.format == "other"
        assert predictor(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    assert latency([str(artifact.path), "--batches", "2", "--runs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "other"

    ctx = context(tmp_path, inputs={"model": artifact}, name="export", data=blob_data(400))
    export.run(ctx, ExportStage(seed=0))
    assert "`model.other`: the model for other runtime" in (ctx.staging / "README.md").read_text()
    assert load_model(ctx.staging).format == "other"


def test_a_format_that_nothing_loads_is_refused_before_anything_is_written(tmp_path: Path, model: Artifact) -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.int8\.quantizer writes the format 'other', which nothing here loads"
    ):
        quantized(tmp_path, model)


def test_a_model_of_an_unknown_format_is_refused(tmp_path: Path, model: Artifact) -> None:
    config = json.loads(model.file("config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "other"}))
    with pytest.raises(ArtifactError, match="has format 'other'; this version reads torch and onnx"):
        load_model(tmp_path)


@pytest.mark.parametrize("recipe", [StaticInt8, DynamicInt8])
def test_a_word_is_no_backend(recipe: type) -> None:
    with pytest.raises(ConfigError, match=r"quantizer.backend=foo is no backend; name a class .*OnnxRuntime"):
        recipe(backend="foo")
