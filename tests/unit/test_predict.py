"""Model artifacts on disk: written, loaded in every form, refused where they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import horovod_jobs
from horovod_jobs.artifacts import ArtifactStore
from horovod_jobs.bundle import read_config, resolve
from horovod_jobs.errors import ArtifactError, ConfigError, DataError
from horovod_jobs.export import export_onnx
from horovod_jobs.predict import load_config, load_module, save_model
from tests.support import SMALL_NET, SmallNet

SHAPE = (1, 6, 6)
NAMES = ("a", "b", "c")


class Tied(nn.Module):
    """Two names for one weight, as in language models."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(36, 36, bias=False)
        self.second = nn.Linear(36, 36, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x.flatten(1))))
        return out


def save(directory: Path, model: nn.Module, node: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_model(directory, model, model_node=node, num_classes=3, input_shape=SHAPE, class_names=NAMES)
    return directory


@pytest.fixture
def net() -> SmallNet:
    torch.manual_seed(1)
    model = SmallNet(num_classes=3, input_shape=SHAPE)
    model(torch.randn(16, *SHAPE))
    model.eval()
    return model


@pytest.fixture
def saved(tmp_path: Path, net: SmallNet) -> Path:
    return save(tmp_path / "saved", net, SMALL_NET)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_what_is_loaded_predicts_the_same(saved: Path, net: SmallNet, form: str, batch: int) -> None:
    export_onnx(net, saved / "model.onnx", input_shape=SHAPE)
    path = saved if form == "torch" else saved / "model.onnx"
    predictor = horovod_jobs.load(path, allow_targets=["tests"])
    inputs = torch.randn(batch, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(predictor(inputs), net(inputs), rtol=0, atol=1e-5)
    assert (predictor.format, predictor.num_classes, predictor.class_names) == (form, 3, NAMES)
    assert predictor.parameters == sum(parameter.numel() for parameter in net.parameters())


def test_buffers_are_kept_and_the_model_is_in_evaluation_mode(saved: Path, net: SmallNet) -> None:
    module = load_module(saved, allow_targets=["tests"])
    assert not module.training
    assert torch.equal(module.get_buffer("bn.running_mean"), net.bn.running_mean)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied(num_classes=3).eval()
    path = save(tmp_path / "tied", model, {"_target_": f"{__name__}.Tied"})
    assert (path / "model.safetensors").stat().st_size < 2 * 36 * 36 * 4
    again = load_module(path, allow_targets=[__name__.split(".")[0]])
    assert again.get_parameter("first.weight") is again.second.weight  # type: ignore[union-attr]
    inputs = torch.randn(2, *SHAPE)
    torch.testing.assert_close(again(inputs), model(inputs))


@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 1, 5, 6), (1, 6, 6, 1)])
def test_inputs_of_another_shape_are_refused(saved: Path, net: SmallNet, form: str, shape: tuple[int, ...]) -> None:
    export_onnx(net, saved / "model.onnx", input_shape=SHAPE)
    predictor = horovod_jobs.load(saved if form == "torch" else saved / "model.onnx", allow_targets=["tests"])
    with pytest.raises(DataError, match=r"the model takes \[B, 1, 6, 6\]"):
        predictor(torch.zeros(shape))


def test_a_damaged_artifact_is_refused(tmp_path: Path, net: SmallNet) -> None:
    store = ArtifactStore(tmp_path / "store")
    staging = save(store.staging("model", "ab" * 32), net, SMALL_NET)
    artifact = store.publish(staging, kind="model", fingerprint="ab" * 32, meta={})
    assert load_config(read_config(artifact), allow_targets=["tests"]).format == "torch"
    weights = bytearray(artifact.file("model.safetensors").read_bytes())
    weights[-1] ^= 1
    artifact.file("model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"damaged \(model.safetensors"):
        horovod_jobs.load(artifact.path, allow_targets=["tests"])


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_classes"] = 4
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="do not fit tests.support.SmallNet"):
        load_module(saved, allow_targets=["tests"])


def test_missing_keys_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m", nn.Linear(2, 2), SMALL_NET)
    with pytest.raises(ArtifactError, match="do not fit"):
        load_module(path, allow_targets=["tests"])


def test_a_file_that_is_no_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ArtifactError, match="do not fit"):
        load_module(saved, allow_targets=["tests"])


def test_an_onnx_model_is_no_module(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "format": "onnx"}))
    with pytest.raises(ArtifactError, match="give a torch model"):
        load_module(saved)
    with pytest.raises(ArtifactError, match=r"has no model\.onnx"):
        horovod_jobs.load(saved)
    (saved / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ArtifactError, match="cannot load"):
        horovod_jobs.load(saved)


def test_code_that_is_not_allowed_does_not_run(saved: Path) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        horovod_jobs.load(saved)


@pytest.mark.parametrize("settings", [{"threads": 0}, {"device": "cuda"}])
def test_values_that_cannot_be_used(saved: Path, net: SmallNet, settings: dict[str, Any]) -> None:
    export_onnx(net, saved / "model.onnx", input_shape=SHAPE)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        horovod_jobs.load(saved / "model.onnx", **settings)


def test_a_stage_of_a_run_is_found(tmp_path: Path, saved: Path) -> None:
    run = tmp_path / "runs" / "latest"
    run.mkdir(parents=True)
    stages = [{"name": "student", "artifact": "saved"}, {"name": "report", "artifact": None}]
    (run / "manifest.json").write_text(json.dumps({"store": "../..", "stages": stages}))
    assert read_config(f"{run}:student").num_classes == 3
    assert horovod_jobs.load(f"{run}:student", allow_targets=["tests"]).num_classes == 3
    with pytest.raises(ArtifactError, match="no artifact of a stage 'report'; those with one: student"):
        resolve(f"{run}:report")
    with pytest.raises(ArtifactError, match=r"no run at .*nowhere"):
        resolve(tmp_path / "nowhere:student")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no model at"), ("{", "cannot be read"), ("{}", "cannot be read")]
)
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        horovod_jobs.load(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import horovod_jobs, horovod_jobs.predict, sys; print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
