"""The same job in every world: one run directory, one manifest, the same loss curve; and what must not differ or leak."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.support import (
    BIN,
    JOB,
    MPIRUN,
    TINY,
    WORLD,
    Forks,
    events,
    left_behind,
    manifest,
    run,
    run_directories,
    stage,
    valid_manifest,
    weights,
)

HOROVODRUN = str(BIN / "horovodrun")
CURVE = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
WORLDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    # how it is started: launcher, overrides, controller in the manifest
    "horovodrun --gloo": ((HOROVODRUN, "--gloo", "-np", "2"), (), "gloo"),
    "horovodrun": (
        (HOROVODRUN, "-np", "2"),
        (),
        "mpi",
    ),  # As it is typed: launch/horovod-0.28.1.fixes makes Open MPI 5 take it.
    "mpirun": ((*MPIRUN, "-np", "2"), (), "mpi"),
    "launch=local": ((), WORLD, "mpi"),
    "launch=local, gloo": ((), (*WORLD, "launch.controller=gloo"), "gloo"),
}
# Random numbers of dropout are a function of the rank, so a curve that is the same for every world has none.
EXACT = (*TINY, "model.dropout=0")


def curve(cwd: Path, *, run: str = "latest") -> list[dict[str, float]]:
    """What the run told at the end of each epoch."""
    return [{key: entry[key] for key in CURVE} for entry in events(cwd, run=run) if entry["event"] == "epoch"]


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The curve of one process."""
    directory = tmp_path_factory.mktemp("alone")
    done = forks.run(*EXACT, cwd=directory)
    assert done.code == 0, done.text
    assert valid_manifest(directory)["world"] == {"size": 1, "hosts": 1, "controller": "none"}
    found = curve(directory)
    assert len(found) == 2
    assert found[1]["train_loss"] < found[0]["train_loss"]
    return found


@pytest.mark.parametrize("how", WORLDS)
def test_every_way_to_start_two_ranks(how: str, alone: list[dict[str, float]], tmp_path: Path) -> None:
    launcher, overrides, controller = WORLDS[how]
    done = run(*EXACT, *overrides, cwd=tmp_path, launcher=launcher)
    assert done.code == 0, done.text
    assert len(run_directories(tmp_path)) == 1
    told = valid_manifest(tmp_path)
    assert told["status"] == "done"
    assert told["world"] == {"size": 2, "hosts": 1, "controller": controller}
    assert told["command"][0] == "horovod-jobs"
    assert [*TINY][1] in told["command"]
    assert "launch=none" not in told["command"], "the command to repeat it is the one that was typed"
    assert left_behind(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / "runs" / "latest" / "logs").iterdir()) == [
        "rank-0.log",
        "rank-1.log",
    ]
    ours = curve(tmp_path)
    assert len(ours) == len(alone)
    for epoch, reference in zip(ours, alone, strict=True):
        assert epoch == pytest.approx(reference, rel=1e-4), "the same loss curve to rounding"


def test_three_ranks_as_well(alone: list[dict[str, float]], tmp_path: Path) -> None:
    done = run(*EXACT, "launch=local", "launch.np=3", cwd=tmp_path)
    assert done.code == 0, done.text
    assert valid_manifest(tmp_path)["world"]["size"] == 3
    assert curve(tmp_path)[-1] == pytest.approx(alone[-1], rel=1e-4)


def test_the_same_command_again_reuses_everything(forks: Forks, tmp_path: Path) -> None:
    pair = (*TINY, "graph=pair")
    first = forks.run(*pair, cwd=tmp_path)
    assert first.code == 0, first.text
    before = weights(tmp_path)
    second = forks.run(*pair, cwd=tmp_path)
    assert second.code == 0, second.text
    assert {entry["name"]: entry["status"] for entry in valid_manifest(tmp_path)["stages"]} == {
        "teacher": "reused",
        "student": "reused",
    }
    assert weights(tmp_path) == before
    assert stage(manifest(tmp_path), "student")["metrics"]["steps"] == 20, "a reused stage keeps its figures"


def test_a_sweep_trains_its_teacher_once(forks: Forks, tmp_path: Path) -> None:
    done = forks.run("-m", *TINY, "graph=pair", "distiller.temperature=1,2,4", cwd=tmp_path)
    assert done.code == 0, done.text
    told = [valid_manifest(tmp_path, run=path.name) for path in run_directories(tmp_path)]
    assert sorted(stage(one, "teacher")["status"] for one in told) == ["ran", "reused", "reused"]
    assert [stage(one, "student")["status"] for one in told] == ["ran"] * 3
    assert len({stage(one, "teacher")["artifact"] for one in told}) == 1
    assert len({stage(one, "student")["artifact"] for one in told}) == 3
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("how", ["one process", pytest.param("mpirun", marks=pytest.mark.thorough), "launch=local"])
def test_a_sweep_in_every_world(how: str, forks: Forks, tmp_path: Path) -> None:
    sweep = ("-m", *TINY, "fit.epochs=1,2")
    if how == "one process":
        done = forks.run(*sweep, cwd=tmp_path)
    else:
        done = run(
            *sweep,
            *(WORLD if how == "launch=local" else ()),
            cwd=tmp_path,
            launcher=(*MPIRUN, "-np", "2") if how == "mpirun" else (),
        )
    assert done.code == 0, done.text
    told = [valid_manifest(tmp_path, run=path.name) for path in run_directories(tmp_path)]
    assert sorted(stage(one, "model")["metrics"]["epochs"] for one in told) == [1, 2]
    assert {one["world"]["size"] for one in told} == {1 if how == "one process" else 2}
    assert len(weights(tmp_path)) == 2
    assert left_behind(tmp_path) == []


def test_ranks_with_different_configs_stop_and_name_the_keys(tmp_path: Path) -> None:
    # The launcher's last words are the job's own command, so the second rank's differing keys come as its arguments.
    first = ("-np", "1", *JOB, *TINY, "fit.epochs=1", "optimizer.lr=0.1", ":", "-np", "1")
    done = run(*TINY, "fit.epochs=2", "optimizer.lr=0.2", cwd=tmp_path, launcher=(*MPIRUN, *first))
    assert done.code == 9, done.text
    assert "Traceback" not in done.err, done.text
    assert len(done.errors) == 1, done.text
    assert "ranks were given different configs" in done.errors[0]
    assert re.search(r"fit\.epochs: rank 0 1, rank 1 2", done.errors[0]), done.text
    assert re.search(r"optimizer\.lr: rank 0 0\.1, rank 1 0\.2", done.errors[0]), done.text
    assert not run_directories(tmp_path), "nothing has started"


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_secrets_stay_behind(controller: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    overrides = (
        f"+data.record_environment_in={seen}",
        "launch.env=[WANTED]",
        f"launch.controller={controller}",
        "fit.max_steps=1",
    )
    secrets = {"DATABASE_PASSWORD": "secret-1", "AWS_SECRET_ACCESS_KEY": "secret-2", "WANTED": "yes"}
    done = run(*TINY, *WORLD, *overrides, cwd=tmp_path, env=secrets)
    assert done.code == 0, done.text
    names = [set(path.read_text(encoding="utf-8").splitlines()) for path in seen.iterdir()]
    assert len(names) == 2, "two ranks looked"
    for one in names:
        assert "WANTED" in one
        assert not {"DATABASE_PASSWORD", "AWS_SECRET_ACCESS_KEY"} & one
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path for path in written if b"secret-" in path.read_bytes()]


def test_a_dry_run_prints_the_command_and_starts_nothing(forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*TINY, "launch=local", "launch.np=4", "launch.dry_run=true", "fit.epochs=3", cwd=tmp_path)
    assert done.code == 0, done.text
    words = shlex.split(done.out)
    assert Path(words[0]).name in ("mpirun", "horovodrun")
    assert words[words.index("-np") + 1] == "4"
    assert "fit.epochs=3" in words
    assert "dry_run" not in done.out, "what is shown is what would run"
    assert not (tmp_path / "runs").exists()


def test_a_plan_runs_nothing(forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*TINY, "graph=pair", "plan=true", cwd=tmp_path)
    assert done.code == 0, done.text
    rows = {line.split("│")[1].strip(): line for line in done.out.splitlines() if line.count("│") > 4}
    assert "no artifact yet" in rows["teacher"]
    assert "run" in rows["student"]
    assert not (tmp_path / "runs").exists()
    assert not weights(tmp_path)


def test_help_and_the_composed_config(forks: Forks, tmp_path: Path) -> None:
    shown = forks.run("--help", cwd=tmp_path)
    assert shown.code == 0, shown.text
    for told in ("launch=local launch.np=2", "plan=true", "resnet20", "allow_targets", "Exit codes"):
        assert told in shown.out
    composed = forks.run(*TINY, "--cfg", "job", cwd=tmp_path)
    assert composed.code == 0, composed.text
    assert "global_batch: 24" in composed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_into_a_pipe_that_closes_is_no_error(tmp_path: Path, unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "horovod_jobs", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert said == b""


def test_events_are_json_lines(forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*TINY, "fit.checkpoint_every_steps=10", cwd=tmp_path)
    assert done.code == 0, done.text
    told = [
        json.loads(line)
        for line in (tmp_path / "runs" / "latest" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [entry["event"] for entry in told] == [
        "stage_start",
        "checkpoint",
        "epoch",
        "checkpoint",
        "epoch",
        "stage_end",
        "job_end",
    ]
    assert all(earlier["time"] <= later["time"] for earlier, later in pairwise(told))
