"""The main job's graph, small: every kind of stage in a world of two, and what a person finds afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.integration.support import WORLD, environment, left_behind, run, stage, valid_manifest

SMALL = (
    *("graph=compress", "data=digits", "model=mlp", "model.hidden=[64]", "model@student=mlp", "student.hidden=[16]"),
    *(
        "footprint=replay",
        "tracker=none",
        "run.progress=none",
        "fit.epochs=6",
        "fit.global_batch=64",
        "optimizer.lr=0.05",
    ),
    *("stages.int8.calibration_samples=256", "stages.int8.max_drop=5"),
    *(f"stages.eval_{name}.latency_runs=5" for name in ("teacher", "plain", "student", "onnx", "int8")),
)
KINDS = {
    "teacher": "train",
    "plain": "train",
    "student": "distill",
    "int8": "quantize",
    "export": "export",
    "report": "report",
}
EVALUATED = {
    "eval_teacher": "teacher",
    "eval_plain": "plain",
    "eval_student": "student",
    "eval_onnx": "export",
    "eval_int8": "int8",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the whole graph has run once in two ranks."""
    directory = tmp_path_factory.mktemp("job")
    done = run(*SMALL, *WORLD, cwd=directory)
    assert done.code == 0, done.text
    assert "Traceback" not in done.err, done.text
    assert "report.html" in done.out, done.text
    for name in ("teacher", "student", "int8"):
        assert name in done.out, "the table ends the job"
    return directory


def test_every_stage_ran_and_the_manifest_obeys_its_schema(job: Path) -> None:
    told = valid_manifest(job)
    assert (told["status"], told["exit_code"], told["error"]) == ("done", 0, None)
    assert told["world"] == {"size": 2, "hosts": 1, "controller": "mpi"}
    assert {entry["name"]: entry["kind"] for entry in told["stages"]} == {
        **KINDS,
        **dict.fromkeys(EVALUATED, "evaluate"),
    }
    assert {entry["status"] for entry in told["stages"]} == {"ran"}
    for entry in told["stages"]:
        assert entry["seconds"] > 0
        assert (job / "artifacts" / entry["artifact"] / "artifact.json").is_file()
    assert left_behind(job) == []


def test_the_figures_hang_together(job: Path) -> None:
    told = valid_manifest(job)
    assert (
        stage(told, "student")["parameters"]
        == stage(told, "plain")["parameters"]
        < stage(told, "teacher")["parameters"]
    )
    for name in EVALUATED:
        entry = stage(told, name)
        assert 0.5 < entry["metrics"]["accuracy"] <= 1, "ten classes: a guess is right one time in ten"
        assert entry["metrics"]["worst_class_accuracy"] <= entry["metrics"]["accuracy"] <= entry["metrics"]["top_5"]
        assert set(entry["latency_ms"]) == {"1", "64"}
        assert all(0 < figures["p50"] <= figures["p95"] for figures in entry["latency_ms"].values())
    int8 = stage(told, "int8")["metrics"]
    assert int8["drop_points"] == pytest.approx(100 * (int8["fp32_accuracy"] - int8["int8_accuracy"]))
    spent = [entry["energy_kwh"] for entry in told["stages"]]
    assert all(value is not None and value > 0 for value in spent)
    assert told["totals"]["energy_kwh"] == pytest.approx(sum(spent))
    assert told["totals"]["seconds"] >= sum(entry["seconds"] for entry in told["stages"]) * 0.99


@pytest.mark.parametrize("evaluation", EVALUATED)
def test_loading_the_model_gives_the_evaluations_accuracy(
    evaluation: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import horovod_jobs
    from horovod_jobs.data.digits import digits

    monkeypatch.chdir(job)
    model = horovod_jobs.load(f"runs/latest:{EVALUATED[evaluation]}")
    split = digits().test
    assert model.preprocessing == split.preprocessing, "it came along, to the quantized model too"
    batch = split.fetch(torch.arange(len(split)))
    right = (model(batch.inputs).argmax(dim=1) == batch.targets).double().mean()
    assert float(right) == pytest.approx(stage(valid_manifest(job), evaluation)["metrics"]["accuracy"], abs=1e-9)


def test_the_export_predicts_what_the_student_predicts(job: Path) -> None:
    import torch

    import horovod_jobs

    told = valid_manifest(job)
    inputs = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    student = horovod_jobs.load(job / "artifacts" / stage(told, "student")["artifact"])
    exported = horovod_jobs.load(job / "artifacts" / stage(told, "export")["artifact"])
    assert torch.allclose(student(inputs), exported(inputs), atol=1e-4)
    (onnx,) = (job / "artifacts" / stage(told, "export")["artifact"]).rglob("model.onnx")
    assert torch.allclose(student(inputs), horovod_jobs.load(onnx)(inputs), atol=1e-4)


class _Loads(HTMLParser):
    """What a browser would fetch to show a page; a link that a person may follow is none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if (
                name in ("src", "srcset", "poster", "data")
                or (name in ("href", "xlink:href") and tag in ("link", "image", "use"))
            ) and value:
                self.found.append(value)


def test_the_report_is_one_file(job: Path) -> None:
    text = (job / "runs" / "latest" / "report.html").read_text(encoding="utf-8")
    page = _Loads()
    page.feed(text)
    assert [value for value in page.found if not value.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", text)
    assert "table" in page.tags
    assert {"svg", "img"} & set(page.tags), "it has plots"
    told = valid_manifest(job)
    for name in EVALUATED:
        assert f"{100 * stage(told, name)['metrics']['accuracy']:.2f}" in text, name
    assert "launch.np=2" in text, "the command to reproduce it"


def test_the_model_card_has_metadata(job: Path) -> None:
    text = (job / "runs" / "latest" / "model_card.md").read_text(encoding="utf-8")
    _, front, body = text.split("---", 2)
    assert isinstance(yaml.safe_load(front), dict)
    assert body.strip().startswith("#")


def runs(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `horovod-runs` command."""
    return subprocess.run(
        [sys.executable, "-m", "horovod_jobs.runs", *arguments],
        cwd=job,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_horovod_runs_reads_it(job: Path) -> None:
    shown = runs(job, "show", "latest", "--json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert valid_manifest(job)["run_id"] in shown.stdout
    assert "stages" in told or "manifest" in told
    listed = runs(job, "ls")
    assert listed.returncode == 0, listed.stderr
    assert valid_manifest(job)["run_id"] in listed.stdout
    unknown = runs(job, "show", "nothing")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: "), unknown.stderr
    assert "Traceback" not in unknown.stderr
