"""Latency in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.export import export_onnx
from horovod_jobs.latency import child_environment, main, measure, peak_memory_bytes, time_calls
from horovod_jobs.models.cnn import StridedCnn
from horovod_jobs.predict import save_model

NODE = {"_target_": "horovod_jobs.models.cnn.StridedCnn", "widths": [8, 16], "strides": [1, 2]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    model = StridedCnn(num_classes=3, input_shape=(1, 16, 16), widths=[8, 16], strides=[1, 2])
    save_model(directory, model, model_node=NODE, num_classes=3, input_shape=(1, 16, 16), class_names=("a", "b", "c"))
    export_onnx(model, directory / "model.onnx", input_shape=(1, 16, 16))
    return directory


@pytest.mark.parametrize("file", [".", "model.onnx"])
def test_figures_are_measured_at_every_batch(bundle: Path, file: str) -> None:
    samples = np.random.default_rng(0).standard_normal((8, 1, 16, 16), dtype=np.float32)
    found = measure(bundle / file, samples=samples, batches=[1, 64], runs=5, threads=1)
    latency = found["latency_ms"]
    assert set(latency) == {"1", "64"}
    assert all(0 < figures["p50"] <= figures["p95"] for figures in latency.values())
    assert latency["64"]["p50"] > latency["1"]["p50"]
    assert found["format"] == ("torch" if file == "." else "onnx")
    assert found["inputs"] == "samples"
    assert 0 < found["model_memory_bytes"] < found["peak_memory_bytes"]


def test_an_onnx_model_is_measured_without_torch_in_memory(bundle: Path) -> None:
    samples = np.zeros((1, 1, 16, 16), np.float32)
    peaks = [
        measure(bundle / file, samples=samples, batches=[1], runs=1, threads=1)["peak_memory_bytes"]
        for file in (".", "model.onnx")
    ]
    assert peaks[1] < 0.7 * peaks[0]


def test_the_starting_process_does_not_count(bundle: Path) -> None:
    held = torch.ones(400 * 2**20 // 4)
    samples = np.zeros((1, 1, 16, 16), np.float32)
    found = measure(bundle / "model.onnx", samples=samples, batches=[1], runs=1, threads=1)
    assert held.sum() > 0
    assert found["peak_memory_bytes"] < 400 * 2**20 < peak_memory_bytes()


def test_the_environment_is_of_no_world() -> None:
    given = {
        "HOROVOD_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_RANK": "1",
        "PATH": "/bin",
        "OMP_NUM_THREADS": "8",
        "HOROVOD_JOBS_DATA": "/data",
    }
    found = child_environment(given, threads=2)
    assert [key for key in found if key.startswith(("HOROVOD_", "OMPI_", "PMIX_"))] == ["HOROVOD_JOBS_DATA"]
    assert (found["PATH"], found["OMP_NUM_THREADS"], found["MALLOC_MMAP_MAX_"]) == ("/bin", "2", "0")


def test_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("horovod_jobs.latency.time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    found = time_calls(lambda: calls.append(1), runs=4)
    assert len(calls) > 4
    assert found == {"p50": 1000.0, "p95": 1000.0}


@pytest.mark.parametrize("changes", [{"batches": []}, {"batches": [0]}, {"runs": 0}, {"threads": 0}])
def test_values_that_cannot_be_used(bundle: Path, changes: dict[str, object]) -> None:
    settings = {"batches": [1], "runs": 1, "threads": 1, **changes}
    with pytest.raises(ConfigError, match="latency_"):
        measure(bundle, samples=np.zeros((1, 1, 16, 16), np.float32), **settings)  # type: ignore[arg-type]


def test_a_failing_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no model at"):
        measure(tmp_path, samples=np.zeros((1, 1), np.float32), batches=[1], runs=1, threads=1)


def test_the_command_prints_text_or_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(bundle / "model.onnx"), "--batches", "1,2", "--runs", "2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "batch     2:" in text
    assert "random normal" in text
    assert main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["latency_ms"]) == {"1", "2"}
    assert main([str(bundle / "nothing")]) == 4
    assert "error: no model at" in capsys.readouterr().err
