"""Faults as schedules: each strikes at a step, is read back from the log, and the job ends in the untouched run's weights."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from datetime import datetime
from pathlib import Path

import pytest

from horovod_jobs import runs
from horovod_jobs.chaos import strikes
from tests.integration.parts import CLOCK_JUMPS
from tests.integration.support import (
    TINY,
    WORLD,
    Forks,
    Running,
    check,
    events,
    left_behind,
    manifest,
    run,
    stage,
    start,
    wait_for,
    weights,
)

LONG = (*TINY, "fit.epochs=12", "fit.checkpoint_every_steps=20", "fit.ema_decay=0.9")
SOAK = ("launch.restarts=5", "run.silent_limit_s=4", "run.stall_limit_s=8")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the run in two ranks that nothing strikes."""
    directory = tmp_path_factory.mktemp("untouched")
    done = run(*LONG, *WORLD, cwd=directory)
    assert done.code == 0, done.text
    return weights(directory)


def schedule(*faults: tuple[str, int, int]) -> str:
    entries = ",".join(f"{{fault: {fault}, rank: {rank}, step: {step}, stage: model}}" for fault, rank, step in faults)
    return f"chaos.schedule=[{entries}]"


def pause(running: Running) -> None:
    for pid in running.ranks().values():
        os.kill(pid, signal.SIGSTOP)


def resume(running: Running) -> None:
    for pid in running.ranks().values():
        os.kill(pid, signal.SIGCONT)


def test_a_job_outlives_a_schedule_of_faults(tmp_path: Path, untouched: dict[str, str]) -> None:
    faults = [("kill", 0, 30), ("stop", 1, 50), ("exception", 1, 70)]
    done = run(*LONG, *WORLD, *SOAK, "chaos=kills", schedule(*faults), cwd=tmp_path, timeout_s=400)
    assert done.code == 0, done.text
    told = strikes(tmp_path / "runs" / "chaos.jsonl")
    assert [(entry["fault"], entry["rank"], entry["step"]) for entry in told] == faults
    assert weights(tmp_path) == untouched, "bit for bit the same"
    assert manifest(tmp_path)["status"] == "done"
    assert stage(manifest(tmp_path), "model")["resumed_from_step"] == 60
    assert "start 3 of launch.restarts=5" in done.err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("controller", "fault", "lost"), [("mpi", "stop", 0), ("gloo", "hang", 1)])
def test_a_rank_that_does_not_come_is_named_with_every_stack(
    controller: str, fault: str, lost: int, tmp_path: Path
) -> None:
    """The other two: tests/cluster/test_fault_matrix."""
    named_with_every_stack(controller, fault, lost=lost, directory=tmp_path)


def named_with_every_stack(controller: str, fault: str, *, lost: int, directory: Path) -> None:
    """One of two ranks is stopped (``stop``) or works and never comes (``hang``): the watchdog ends the job within its limits."""
    world = (*WORLD, f"launch.controller={controller}")
    done = run(*LONG, *world, *SOAK[1:], "run.id=one", "chaos=kills", schedule((fault, lost, 30)), cwd=directory)
    (struck,) = strikes(directory / "runs" / "chaos.jsonl")
    assert (struck["fault"], struck["rank"], struck["step"]) == (fault, lost, 30)
    assert done.code == 9, done.text
    assert "Traceback" not in done.err, done.text
    told = manifest(directory, run="one")  # By whoever is left, where rank 0 is lost.
    assert (told["status"], told["exit_code"]) == ("failed", 9)
    who = rf"rank {lost} \(host \S+, pid {struck['pid']}\)"
    message = {
        "stop": rf"for \d+ s, and {who} gave no sign of life for 4 s",
        "hang": rf"for \d+ s \(run.stall_limit_s=8\), and the others are: {who} at work",
    }[fault]
    assert re.search(rf"rank {1 - lost} has waited in '[a-z.]+' {message}", told["error"]), told["error"]
    assert told["error"] in done.err
    ended = datetime.fromisoformat(told["ended_at"]).timestamp()  # A whole second.
    assert ended - struck["time"] < 30, "the limit, a beat, two for the stacks, and a machine that does other things"
    logs = directory / "runs" / "one" / "logs"
    assert "horovod_jobs/comm/" in (logs / f"stacks-{1 - lost}.txt").read_text()
    if fault == "hang":  # It runs, so it can say where.
        assert "chaos.py" in (logs / f"stacks-{lost}.txt").read_text()
    if lost != 0:  # Rank 0 writes them.
        assert events(directory, run="one")[-1]["event"] == "job_end"


@pytest.mark.thorough
def test_three_ranks_end_in_the_same_weights_where_that_is_asked_for(tmp_path: Path) -> None:
    job, ended = (*LONG, "strategy=repeatable", "launch=local", "launch.np=3", "run.silent_limit_s=60"), []
    for name, more in (("untouched", ()), ("killed", ("launch.restarts=2", "chaos=kills", schedule(("kill", 2, 50))))):
        directory = tmp_path / name
        directory.mkdir()
        done = run(*job, *more, cwd=directory)
        assert done.code == 0, done.text
        ended.append(weights(directory))
    assert stage(manifest(tmp_path / "killed"), "model")["resumed_from_step"] >= 40
    assert ended[0] == ended[1], "bit for bit the same"


@pytest.mark.parametrize(("controller", "rank"), [pytest.param("mpi", 0, marks=pytest.mark.thorough), ("gloo", 1)])
def test_a_wall_clock_that_jumps_ends_nothing(
    controller: str, rank: int, tmp_path: Path, untouched: dict[str, str]
) -> None:
    world = (*WORLD, f"launch.controller={controller}")
    done = run(*LONG, *world, *SOAK[1:], cwd=tmp_path, env={CLOCK_JUMPS: str(rank)})
    assert done.code == 0, done.text
    assert weights(tmp_path) == untouched
    assert 0 < manifest(tmp_path)["totals"]["seconds"] < done.seconds
    sign = tmp_path / "runs" / "latest" / "ranks" / f"rank-{rank}.json"
    assert abs(json.loads(sign.read_text())["time"] - sign.stat().st_mtime) > 3000, "it has jumped"


def test_a_launcher_of_gloo_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    """With MPI: test_interrupt. With other strategies: tests/cluster/test_fault_matrix.py."""
    job = (*LONG, *WORLD, "launch.controller=gloo")
    running = start(*job, cwd=tmp_path)
    wait_for(lambda: any(entry["event"] == "checkpoint" for entry in events(tmp_path)), what="a checkpoint")
    running.process.kill()
    assert running.wait().code == -signal.SIGKILL
    running.nothing_left()
    assert manifest(tmp_path)["status"] in ("running", "interrupted"), (
        "killed with it, or told to stop and quick enough to write it"
    )
    done = run(*job, cwd=tmp_path)
    assert done.code == 0, done.text
    assert stage(manifest(tmp_path), "model")["resumed_from_step"] >= 20
    assert left_behind(tmp_path) == []


def test_a_run_that_was_killed_outright_is_shown_as_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, told = tmp_path / "runs" / "one", ["one", f"--root={tmp_path / 'runs'}"]
    running = start(*LONG, *WORLD, "run.id=one", cwd=tmp_path)
    wait_for(lambda: any(entry["event"] == "checkpoint" for entry in events(tmp_path, run="one")), what="a checkpoint")
    pause(running)  # It lives and says nothing, and its lock is held.
    for path in (run_dir / "ranks").glob("rank-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"every_s": 0.01}))
        os.utime(path, (0, 0))
    assert runs.main(["watch", *told, "--once"]) == 0
    assert capsys.readouterr().out.startswith("one  tiny  running")
    running.kill()
    assert runs.main(["watch", *told, "--json"]) == 9
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["gone"]
    assert shown.err.startswith("error: run one is gone: ")
    assert manifest(tmp_path, run="one")["status"] == "running"
    assert run(*LONG, *WORLD, "run.id=one", cwd=tmp_path).code == 0
    assert runs.main(["watch", *told, "--once"]) == 0


def test_two_launchers_at_the_same_time(tmp_path: Path) -> None:
    both = [start(*LONG, *WORLD, "run.id=one", cwd=tmp_path) for _ in range(2)]
    done = [running.wait() for running in both]
    for running in both:
        running.nothing_left()
    done.sort(key=lambda one: one.code)
    assert done[0].code == 0, done[0].text
    check(done[1], code=6, pattern=r"run one is another job's at this moment \(process \d+ on \S+\)")
    assert manifest(tmp_path, run="one")["status"] == "done"


def test_two_jobs_in_different_worlds_want_the_same_artifact(tmp_path: Path) -> None:
    first = start(*LONG, *WORLD, "run.id=one", cwd=tmp_path)
    wait_for(lambda: any(entry["event"] == "checkpoint" for entry in events(tmp_path, run="one")), what="a checkpoint")
    pause(first)
    second = run(*LONG, "launch=local", "launch.np=1", "run.id=two", cwd=tmp_path)
    resume(first)
    check(second, code=6, pattern=r"process \d+ on \S+")
    done = first.wait()
    first.nothing_left()
    assert done.code == 0, done.text
    assert left_behind(tmp_path) == []


def test_two_launchers_with_the_same_run_id(forks: Forks, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    with (run_dir / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(f"process {os.getpid()} on here")
        stream.flush()
        done = forks.run(*TINY, "run.id=one", cwd=tmp_path)
        assert done.code == 6, done.text
        assert done.errors == [
            f"error: run one is another job's at this moment (process {os.getpid()} on here); wait for it to end, or leave run.id out"
        ]
        assert not (run_dir / "manifest.json").exists()
    assert forks.run(*TINY, "run.id=one", cwd=tmp_path).code == 0
    assert forks.run(*TINY, "run.id=one", cwd=tmp_path).code == 0
    before = (run_dir / "manifest.json").read_bytes()
    other = forks.run(*TINY, "run.id=one", "fit.epochs=3", cwd=tmp_path)
    assert other.code == 2, other.text
    assert other.errors[0].startswith(
        "error: run.id=one is a run of another job, which is complete (fit.epochs: 2 there, 3 here"
    )
    assert (run_dir / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chaos.times=-1", "chaos.times=-1"),
        ("chaos.faults=[flood]", "fault 'flood' is not known"),
        ("launch.restarts=-1", "launch.restarts=-1 is not a number of starts"),
    ],
)
def test_bad_settings(override: str, message: str, forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*TINY, "chaos=kills", override, cwd=tmp_path)
    assert done.code == 2, done.text
    assert len(done.errors) == 1
    assert message in done.errors[0]
