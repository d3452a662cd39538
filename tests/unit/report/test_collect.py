"""Rows, lineage and roles come from the manifest and the artifacts, and a missing artifact does not stop a report."""

from __future__ import annotations

import json
import shutil

import pytest

from horovod_jobs import manifest as manifests
from horovod_jobs.errors import ArtifactError
from horovod_jobs.report import collect
from horovod_jobs.report.weights import weights_bytes


def test_sample_obeys_the_schema(sample, tmp_path):
    import jsonschema

    for status in ("done", "running", "failed"):
        run_dir = sample.write_sample(tmp_path / status, status=status)
        jsonschema.Draft202012Validator(manifests.schema()).validate(manifests.read(run_dir))


def test_rows_follow_the_needs_back_to_what_made_the_model(sample, tmp_path):
    data = collect(sample.write_sample(tmp_path))
    assert [row.label for row in data.models] == ["teacher", "student without distillation", "student", "int8 student"]
    assert [row.stage for row in data.models] == ["teacher", "plain", "student", "int8"]
    assert [row.kind for row in data.models] == ["train", "train", "distill", "quantize"]
    int8 = data.models[3]
    assert int8.seconds == 9.4  # of the quantize stage, not of its evaluation
    assert int8.energy_kwh == pytest.approx(9.4 * 55 / 3.6e6)
    assert int8.latency_ms["1"]["p50"] == 0.11
    assert int8.worst_class == "Shirt"
    assert int8.samples == 10_000
    assert len(int8.lineage) == 3
    assert data.final is int8
    assert data.reference is data.models[0]
    assert data.models[0].is_teacher
    assert [curve.stage for curve in data.curves] == ["teacher", "plain", "student"]


def test_bytes_are_counted_in_the_files(sample, tmp_path):
    teacher, *_, int8 = collect(sample.write_sample(tmp_path)).models
    assert teacher.weights_bytes == 4 * 242_762
    assert teacher.file_bytes > teacher.weights_bytes
    assert int8.weights_bytes == 23_530
    assert int8.file_bytes > 2 * int8.weights_bytes  # the graph outweighs the weights


def test_weights_bytes_of_a_damaged_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        weights_bytes(path)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        weights_bytes(path)
    assert weights_bytes(tmp_path / "x.bin") is None


def test_one_model(sample, tmp_path):
    data = collect(sample.write_sample(tmp_path, only={"teacher", "eval_teacher", "report"}))
    assert [row.label for row in data.models] == ["teacher"]
    assert data.final is data.models[0]
    assert data.reference is None


def test_without_a_report_stage_every_evaluation_is_shown(sample, tmp_path):
    data = collect(sample.write_sample(tmp_path, only={"teacher", "plain", "eval_teacher", "eval_plain"}))
    assert [row.label for row in data.models] == ["teacher", "plain"]


def test_a_missing_artifact_is_said_and_not_fatal(sample, tmp_path):
    run_dir = sample.write_sample(tmp_path)
    before = collect(run_dir)
    shutil.rmtree(tmp_path / "artifacts" / before.models[1].ref)
    data = collect(run_dir)
    problems = {stage.entry["name"]: stage.problem for stage in data.stages if stage.problem}
    assert list(problems) == ["plain"]
    assert "no artifact at" in problems["plain"]
    plain = data.models[1]
    assert plain.score == before.models[1].score
    assert plain.seconds == before.models[1].seconds
    assert plain.weights_bytes is None


def test_an_evaluation_from_another_run_by_its_path(sample, tmp_path):
    """A report may need an artifact by path; the model it evaluated is found in the store."""
    run_dir = sample.write_sample(tmp_path)
    manifest = manifests.read(run_dir)
    refs = {stage["name"]: stage["artifact"] for stage in manifest["stages"]}
    keep = [stage for stage in manifest["stages"] if stage["name"] in ("student", "eval_student", "report")]
    keep[0]["needs"] = {}
    keep[2]["needs"] = {"old teacher": str(tmp_path / "artifacts" / refs["eval_teacher"]), "student": "eval_student"}
    manifests.write(run_dir, {**manifest, "stages": keep})
    data = collect(run_dir)
    assert [row.label for row in data.models] == ["old teacher", "student"]
    assert data.models[0].seconds == 152.3
    assert data.models[0].is_teacher


def test_a_run_that_is_no_run(tmp_path):
    with pytest.raises(ArtifactError, match="no run"):
        collect(tmp_path)


def test_the_report_of_a_run_that_ends_with_it_says_done(sample, tmp_path):
    run_dir = sample.write_sample(tmp_path, status="running")
    assert collect(run_dir).status == "done"
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["stages"][3].update(sample.empty("int8", {"model": "student"}, "running"))
    manifests.write(run_dir, manifest)
    assert collect(run_dir).status == "running"
