"""The stages that measure and hand on models, in a world of one: quantize, evaluate, export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_jobs.artifacts import Artifact
from horovod_jobs.bundle import read_config
from horovod_jobs.config import EvaluateStage, ExportStage, QuantizeStage
from horovod_jobs.data.base import DataModule
from horovod_jobs.errors import ConfigError, GateError
from horovod_jobs.predict import load, save_model
from horovod_jobs.preprocessing import Preprocessing
from horovod_jobs.stages import evaluate, export, quantize, train
from horovod_jobs.stages.quantize import check_gate, compare
from tests.support import SMALL_NET, SmallNet, blob_data, context, fit_config, train_stage

STATIC = {"_target_": "horovod_jobs.quantization.quantizer.StaticInt8"}
DYNAMIC = {"_target_": "horovod_jobs.quantization.quantizer.DynamicInt8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A trained small net."""
    directory = tmp_path_factory.mktemp("model")
    ctx = context(directory, name="train", data=blob_data(400))
    train.run(ctx, train_stage(fit=fit_config(epochs=4)))
    return ctx.store.publish(ctx.staging, kind="model", fingerprint="ab" * 32, meta={"stage": "train"})


def quantized(
    directory: Path, model: Artifact, *, data: DataModule | None = None, **changes: Any
) -> tuple[Any, dict[str, Any], Path]:
    ctx = context(directory, inputs={"model": model}, name="int8", data=data or blob_data(400))
    settings = {"seed": 0, "quantizer": STATIC, "calibration_samples": 96, "max_drop": 5.0, **changes}
    result = quantize.run(ctx, QuantizeStage(**settings))
    return result, json.loads((ctx.staging / "config.json").read_text()), ctx.staging


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC])
def test_an_integer_model_is_written_and_held_against_the_original(
    tmp_path: Path, model: Artifact, recipe: dict[str, Any]
) -> None:
    result, config, staging = quantized(tmp_path, model, quantizer=recipe)
    metrics = result.metrics
    assert metrics["fp32_accuracy"] > 0.8
    assert metrics["drop_points"] == pytest.approx(100 * (metrics["fp32_accuracy"] - metrics["int8_accuracy"]))
    assert metrics["agreement"] >= 0.9
    assert [entry["batch"] for entry in result.details["check"]] == [1, 64]
    assert all(entry["max_logit_difference"] > 0 for entry in result.details["check"])
    assert result.details["gate"] == {"split": "validation", "samples": 40, "max_drop_points": 5.0}
    assert config["quantization"]["calibration"]["samples"] == 96
    assert result.model_bytes == sum(path.stat().st_size for path in staging.iterdir())
    predictor = load(staging)
    split = blob_data(400).validation
    assert split is not None
    batch = split.fetch(torch.arange(40))
    accuracy = (predictor(batch.inputs).argmax(1) == batch.targets).double().mean().item()
    assert accuracy == pytest.approx(metrics["int8_accuracy"])


def test_without_a_validation_split_the_test_split_decides_and_that_is_said(
    tmp_path: Path, model: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    data = replace(blob_data(400), validation=None)
    result, _, _ = quantized(tmp_path, model, data=data, check_samples=30)
    assert result.details["gate"]["split"] == "test"
    assert result.details["gate"]["samples"] == 30
    assert "no validation split, so the test split decides" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_samples": 0}, "calibration_samples=0 leaves nothing to observe; use at least 1"),
        ({"calibration_samples": 401}, "calibration_samples=401, but the training split has 400"),
        ({"calibration_batch": 0}, "calibration_batch=0"),
        ({"check_samples": 41}, "check_samples=41 is not from 1 to 40"),
        ({"max_drop": -1.0}, "max_drop=-1.0 is negative"),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, model: Artifact, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantized(tmp_path, model, **changes)


def test_the_gate_names_figures_limit_and_remedy() -> None:
    metrics = {"fp32_accuracy": 0.9, "int8_accuracy": 0.88}
    metrics["drop_points"] = 100 * (metrics["fp32_accuracy"] - metrics["int8_accuracy"])
    check_gate(metrics, primary="accuracy", max_drop=2.0, stage="int8", split="validation")
    check_gate(metrics, primary="accuracy", max_drop=None, stage="int8", split="validation")
    with pytest.raises(
        GateError, match=r"0\.8800 .* 2\.00 points below fp32's 0\.9000, and max_drop=1\.5.*stages\.int8\.max_drop"
    ):
        check_gate(metrics, primary="accuracy", max_drop=1.5, stage="int8", split="validation")


def test_the_gate_stops_a_ruined_model(tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod_jobs.quantization import onnx_graph

    # Biases of the wrong sign: what a mistake in the rewriting of the graph would look like.
    true_rint = onnx_graph.np.rint
    monkeypatch.setattr(onnx_graph.np, "rint", lambda values: true_rint(-values))
    net = SmallNet(num_classes=3, input_shape=(1, 6, 6)).eval()
    net.load_state_dict(load_state(model))
    with torch.no_grad():
        net.bn.bias += 2.0
    ctx = context(tmp_path, name="biased")
    save_model(
        ctx.staging, net, model_node=SMALL_NET, num_classes=3, input_shape=(1, 6, 6), class_names=("a", "b", "c")
    )
    artifact = ctx.store.publish(ctx.staging, kind="model", fingerprint="cd" * 32, meta={})
    with pytest.raises(GateError, match="max_drop=5"):
        quantized(tmp_path, artifact)


def load_state(artifact: Artifact) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(artifact.file("model.safetensors"))


def test_a_second_call_that_differs_is_refused() -> None:
    split = blob_data().test
    calls = iter(range(1000))
    net = SmallNet(num_classes=3, input_shape=(1, 6, 6)).eval()
    assert [entry["agreement"] for entry in compare(net, net, split)] == [1.0, 1.0]
    with pytest.raises(GateError, match="int8 model gives other outputs when it is called again"):
        compare(net, lambda inputs: net(inputs) + next(calls), split)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_evaluate_measures_either_format_by_the_same_code(tmp_path: Path, model: Artifact, form: str) -> None:
    artifact = model
    if form == "onnx":
        _, _, staging = quantized(tmp_path, model)
        store = context(tmp_path).store
        artifact = store.publish(staging, kind="quantized", fingerprint="ef" * 32, meta={})
    ctx = context(tmp_path, inputs={"model": artifact}, name="eval", data=blob_data(400))
    result = evaluate.run(ctx, EvaluateStage(seed=0, latency_batches=[1, 4], latency_runs=3))
    assert result.metrics["accuracy"] > 0.7
    assert {"accuracy", "loss", "worst_class_accuracy", "peak_memory_bytes"} <= set(result.metrics)
    assert result.latency_ms is not None
    assert set(result.latency_ms) == {"1", "4"}
    assert result.model_bytes == artifact.bytes
    assert result.details["format"] == form
    confusion = torch.tensor(result.details["confusion"])
    assert confusion.sum() == 50
    assert result.metrics["accuracy"] == pytest.approx(confusion.diagonal().sum().item() / 50)
    worst = result.details["worst_class"]
    assert result.details["per_class_accuracy"][worst] == result.metrics["worst_class_accuracy"]
    written = json.loads((ctx.staging / "evaluation.json").read_text())
    assert written["metrics"] == result.metrics
    assert written["latency_ms"] == result.latency_ms


def test_evaluate_refuses_what_does_not_fit(tmp_path: Path, model: Artifact) -> None:
    ctx = context(tmp_path, inputs={"model": model}, data=replace(blob_data(), validation=None))
    with pytest.raises(ConfigError, match="split=validation is not in the data set; use one of train, test"):
        evaluate.run(ctx, EvaluateStage(seed=0, split="validation"))
    ctx = context(tmp_path, inputs={"model": model}, data=replace(blob_data(), num_classes=4))
    with pytest.raises(ConfigError, match="the model has 3 classes"):
        evaluate.run(ctx, EvaluateStage(seed=0))


def test_export_bundles_a_torch_model(tmp_path: Path, model: Artifact) -> None:
    ctx = context(tmp_path, inputs={"model": model}, name="export", data=blob_data(400))
    result = export.run(ctx, ExportStage(seed=0))
    assert sorted(path.name for path in ctx.staging.iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]
    assert 0 <= result.metrics["onnx_max_difference"] < 1e-4
    assert result.model_bytes == (ctx.staging / "model.safetensors").stat().st_size
    inputs = torch.randn(3, 1, 6, 6)
    torch_model, onnx_model = load(ctx.staging, allow_targets=["tests"]), load(ctx.staging / "model.onnx")
    torch.testing.assert_close(torch_model(inputs), onnx_model(inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [None, Preprocessing(255.0, 0.3, 0.25), Preprocessing(1.0, (2.5,), (0.5,))])
def test_the_exports_readme_code_runs(
    tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch, how: Preprocessing | None
) -> None:
    """The code with this package needs allow_targets for this model of ours; both prepare raw samples in the same way."""
    config = replace(read_config(model), preprocessing=how)
    source = context(tmp_path, name="source")
    for path in model.path.glob("model.*"):
        shutil.copy(path, source.staging)
    (source.staging / "config.json").write_text(json.dumps(config.to_json()))
    artifact = source.store.publish(source.staging, kind="model", fingerprint="12" * 32, meta={})
    ctx = context(tmp_path, inputs={"model": artifact}, name="export", data=blob_data(400))
    export.run(ctx, ExportStage(seed=0))
    blocks = [block.split("```")[0] for block in (ctx.staging / "README.md").read_text().split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(ctx.staging)
    ours: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    exec(blocks[0].replace("path/to/this/directory", "."), ours)
    exec(blocks[1], alone)
    torch.testing.assert_close(ours["logits"], torch.from_numpy(alone["logits"]), rtol=0, atol=1e-4)
    assert 'allow_targets=["tests"]' in blocks[0]


def test_export_copies_a_quantized_model(tmp_path: Path, model: Artifact) -> None:
    _, _, staging = quantized(tmp_path, model)
    content = (staging / "model.onnx").read_bytes()
    artifact = context(tmp_path).store.publish(staging, kind="quantized", fingerprint="ef" * 32, meta={})
    ctx = context(tmp_path, inputs={"model": artifact}, name="export", data=blob_data(400))
    result = export.run(ctx, ExportStage(seed=0))
    assert (ctx.staging / "model.onnx").read_bytes() == content
    assert not (ctx.staging / "model.safetensors").exists()
    assert result.metrics == {}


def test_export_stops_at_its_tolerance(tmp_path: Path, model: Artifact) -> None:
    ctx = context(tmp_path, inputs={"model": model}, data=blob_data(400))
    with pytest.raises(GateError, match="tolerance=1e-12"):
        export.run(ctx, ExportStage(seed=0, tolerance=1e-12))
    with pytest.raises(ConfigError, match="tolerance=0"):
        export.run(ctx, ExportStage(seed=0, tolerance=0.0))
