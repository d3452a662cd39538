"""examples/predict.py after the first job that the README suggests, and where there is nothing that it could show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support import ROOT, Forks, environment, manifest, stage

PREDICT = ROOT / "examples" / "predict.py"


def predict(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the example as a person would."""
    command = [sys.executable, str(PREDICT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def quick(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``debug=fast`` has run."""
    directory = tmp_path_factory.mktemp("quick")
    done = forks.run("debug=fast", cwd=directory)
    assert done.code == 0, done.text
    return directory


def test_the_quick_job_makes_models_that_differ_and_have_learned(quick: Path) -> None:
    told = manifest(quick)
    accuracy = {
        name: stage(told, name)["metrics"]["accuracy"] for name in ("eval_teacher", "eval_student", "eval_int8")
    }
    assert accuracy["eval_teacher"] > 0.9
    assert min(accuracy.values()) > 0.85
    parameters = [stage(told, name)["parameters"] for name in ("teacher", "student")]
    assert parameters[1] * 10 < parameters[0]


def test_the_newest_student_and_any_other_model_classify_pictures(quick: Path) -> None:
    done = predict("--count", "20", cwd=quick)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    assert sum(line.endswith("right") for line in lines) >= 15
    done = predict("runs/latest:int8", "--count", "2", cwd=quick)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("runs/latest:nothing",), 4, "run runs/latest has no artifact of a stage 'nothing'; those with one: teacher"),
        (("runs/other:student",), 4, "no run at runs/other"),
        (("nowhere",), 4, "no model at nowhere"),
        (("--count", "0"), 3, "--count 0 does not fit the 360 test pictures; use 1 to 360"),
    ],
)
def test_what_is_missing_is_said_in_one_line(quick: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = predict(*arguments, cwd=quick)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {said}")


def test_a_model_of_other_data_is_told_what_the_example_has(forks: Forks, tmp_path: Path) -> None:
    from tests.integration.support import TINY

    done = forks.run(*TINY, "fit.epochs=1", cwd=tmp_path)
    assert done.code == 0, done.text
    done_ = predict("runs/latest:model", cwd=tmp_path)
    # Its class is the tests' own, which the example is not told to trust.
    assert done_.returncode == 2
    assert done_.stderr.startswith("error: _target_=tests.support.SmallNet is not allowed")
    assert done_.stderr.count("\n") == 1
