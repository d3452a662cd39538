"""examples/own_code: a person's own model, data set, loss and optimizer, copied elsewhere, without touching this package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support import ROOT, WORLD, Done, left_behind, manifest, run, stage, valid_manifest, weights

EXAMPLE = ROOT / "examples" / "own_code"
QUICK = ("footprint=none", "tracker=none", "run.progress=none", "fit.epochs=4")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The example, copied to a place of its own."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__")))


def mine(project: Path, *overrides: str) -> Done:
    """Run the example in its directory; this repository comes behind it, where the package is not installed."""
    path = f"{project}{os.pathsep}{ROOT}"
    return run("--config-dir", "conf", "experiment=mine", *QUICK, *overrides, cwd=project, env={"PYTHONPATH": path})


def test_the_example_trains_measures_and_reports(project: Path) -> None:
    done = mine(project, *WORLD)
    assert done.code == 0, done.text
    told = valid_manifest(project)
    assert [entry["status"] for entry in told["stages"]] == ["ran"] * len(told["stages"])
    assert told["world"]["size"] == 2
    accuracy = stage(told, "eval_model")["metrics"]["accuracy"]
    assert accuracy > 0.8, "three classes: a guess is right one time in three"
    assert (project / "runs" / "latest" / "report.html").is_file()
    report = (project / "runs" / "latest" / "report.html").read_text(encoding="utf-8")
    assert "3 Hz" in report
    assert f"PYTHONPATH=.{os.pathsep}{ROOT} horovod-jobs --config-dir conf experiment=mine" in report
    assert "No meter was configured" in report
    card = (project / "runs" / "latest" / "model_card.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    env = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{ROOT}"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip().endswith("Hz")
    assert left_behind(project) == []

    # An edited model is not mistaken for the old one.
    again = mine(project)
    assert again.code == 0, again.text
    assert stage(manifest(project), "model")["status"] == "reused"
    source = project / "my_project.py"
    source.write_text(source.read_text(encoding="utf-8").replace("nn.Tanh()", "nn.ReLU()"), encoding="utf-8")
    edited = mine(project)
    assert edited.code == 0, edited.text
    assert stage(manifest(project), "model")["status"] == "ran"
    assert stage(manifest(project), "eval_model")["status"] == "ran"
    assert len(set(weights(project).values())) == 2


def test_without_allow_targets_it_is_refused_with_the_remedy(project: Path) -> None:
    done = mine(project, "allow_targets=[]")
    assert done.code == 2, done.text
    assert re.search(r"error: .*my_project\.\w+ is not allowed .*add it: allow_targets=\[my_project\]", done.err), (
        done.text
    )


def test_without_pythonpath_it_says_so(project: Path) -> None:
    done = run("--config-dir", str(project / "conf"), "experiment=mine", *QUICK, cwd=project.parent)
    assert done.code == 2, done.text
    assert re.search(
        r"no module named 'my_project'; check the spelling, or put its directory on PYTHONPATH", done.err
    ), done.text
