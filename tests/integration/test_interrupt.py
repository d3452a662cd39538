"""Killed, stopped or interrupted at any moment: the same command again ends in the same weights, and nothing is left running."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import (
    MPIRUN,
    TINY,
    WORLD,
    Done,
    Forks,
    Running,
    events,
    left_behind,
    manifest,
    run,
    run_directories,
    stage,
    start,
    valid_manifest,
    wait_for,
    weights,
)

# Augmentation, dropout, batch norm, an averaged model and momentum: all that a resumed run must find as it was.
LONG = (
    *TINY,
    "fit.epochs=20",
    "fit.checkpoint_every_steps=20",
    "fit.ema_decay=0.9",
    "data.augment={_target_: horovod_jobs.data.augment.ShiftFlipCrop, shift: 1}",
)
STEPS = 200


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the run in two ranks that nobody disturbs."""
    directory = tmp_path_factory.mktemp("untouched")
    done = run(*LONG, *WORLD, cwd=directory)
    assert done.code == 0, done.text
    assert stage(manifest(directory), "model")["metrics"]["steps"] == STEPS
    return weights(directory)


def checkpoints(running: Running) -> list[int]:
    """Steps of the checkpoints that this job has told of; a run that was there before it does not count."""
    new = [path.name for path in run_directories(running.directory) if path not in running.before]
    return [
        entry["step"] for name in new for entry in events(running.directory, run=name) if entry["event"] == "checkpoint"
    ]


def at_checkpoint(running: Running, number: int) -> None:
    """Wait until the job has written so many checkpoints."""

    def look() -> bool:
        assert running.process.poll() is None, running.err.read_text(errors="replace")
        return len(checkpoints(running)) >= number

    wait_for(look, what=f"checkpoint {number}")


def again(cwd: Path, *, wanted: dict[str, str], at_least: int = 20) -> Done:
    """The same command once more: it goes on and ends where the untouched run did."""
    done = run(*LONG, *WORLD, cwd=cwd)
    assert done.code == 0, done.text
    told = valid_manifest(cwd)
    assert told["status"] == "done"
    assert stage(told, "model")["resumed_from_step"] >= at_least
    assert weights(cwd) == wanted, "bit for bit the same"
    assert left_behind(cwd) == []
    assert checkpoints_on_disk(cwd) == [], "the checkpoints of a published stage are gone"
    return done


def kill_rank(number: int) -> Callable[[Running], None]:
    return lambda running: os.kill(running.ranks()[number], signal.SIGKILL)


def kill_launcher(running: Running) -> None:
    running.process.kill()


def kill_mpirun(running: Running) -> None:
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert not Path(tempfile.gettempdir(), f"ompi.{children[0]}").exists(), "a later mpirun with this id would fail"


@pytest.mark.parametrize(
    ("who", "kill"),
    [("rank 0", kill_rank(0)), ("rank 1", kill_rank(1)), ("the launcher", kill_launcher), ("mpirun", kill_mpirun)],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_killed_outright(who: str, kill: Callable[[Running], None], tmp_path: Path, untouched: dict[str, str]) -> None:
    moment = random.Random(f"{who} 1")
    for latest in (4, 2, 1):
        running = start(*LONG, *WORLD, cwd=tmp_path)
        at_checkpoint(running, moment.randint(1, latest))
        wait_for_moment(running, steps=moment.randint(0, 19))
        kill(running)
        done = running.wait()
        if weights(tmp_path) == {}:
            break
        # Where this test's own process gets no core the job is through its 200 steps before it is killed: once more, earlier.
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert done.code != 0, done.text
    assert "Traceback" not in done.err, done.text
    running.nothing_left()
    assert weights(tmp_path) == {}
    told = valid_manifest(tmp_path)
    # Whose launcher is gone may still have had the time for a checkpoint: mpirun sends its ranks SIGTERM first.
    assert told["status"] in ("running", "failed", "interrupted"), "a killed run leaves a true manifest"
    assert stage(told, "model")["status"] in ("running", "failed", "pending")
    again(tmp_path, wanted=untouched)
    assert len(run_directories(tmp_path)) == 2


def wait_for_moment(running: Running, *, steps: int) -> None:
    """Let about so many further steps pass, at the pace of the last checkpoints; the moment need not be exact, only arbitrary."""
    times = [entry["time"] for entry in events(running.directory) if entry["event"] in ("stage_start", "checkpoint")]
    pace_s = (times[-1] - times[-2]) / 20
    deadline = times[-1] + min(1.0, steps * pace_s)
    wait_for(lambda: time.time() >= deadline or running.process.poll() is not None, what="an arbitrary moment")


def test_killed_in_one_process_twice(forks: Forks, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    done = forks.run(*LONG, cwd=whole)
    assert done.code == 0, done.text
    for count in (2, 1):
        running = start(*LONG, cwd=tmp_path)
        at_checkpoint(running, count)
        running.process.kill()
        assert running.wait().code == -signal.SIGKILL
    done = forks.run(*LONG, cwd=tmp_path)
    assert done.code == 0, done.text
    assert stage(valid_manifest(tmp_path), "model")["resumed_from_step"] >= 60
    assert weights(tmp_path) == weights(whole)


def test_a_damaged_last_checkpoint_falls_back_and_says_so(tmp_path: Path, untouched: dict[str, str]) -> None:
    running = start(*LONG, *WORLD, cwd=tmp_path)
    at_checkpoint(running, 3)
    kill_rank(1)(running)
    running.wait()
    running.nothing_left()
    *_, before, last = sorted((tmp_path / "artifacts" / ".work").glob("model-*/step-*"))
    content = bytearray((last / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (last / "state.pt").write_bytes(content)
    done = again(tmp_path, wanted=untouched)
    assert f"checkpoint {last.name} is damaged" in done.err
    assert stage(manifest(tmp_path), "model")["resumed_from_step"] == int(before.name.split("-")[1])


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_sigterm_writes_a_checkpoint_and_says_try_again(
    controller: str, tmp_path: Path, untouched: dict[str, str]
) -> None:
    running = start(*LONG, *WORLD, f"launch.controller={controller}", cwd=tmp_path)
    at_checkpoint(running, 2)
    running.process.terminate()
    done = running.wait()
    running.nothing_left()
    stopped_in_order(done, tmp_path, code=75)
    again(tmp_path, wanted=untouched, at_least=checkpoints_on_disk(tmp_path)[-1])


def stopped_in_order(done: Done, cwd: Path, *, code: int) -> None:
    """A job that was asked to stop said so in one line, with a checkpoint of the step it stopped after."""
    assert done.code == code, done.text
    assert "Traceback" not in done.err, done.text
    assert len(done.errors) == 1, done.text
    assert "the same command goes on from here" in done.errors[0]
    told = valid_manifest(cwd)
    assert (told["status"], told["exit_code"]) == ("interrupted", code)
    assert told["ended_at"] is not None
    assert f"after step {checkpoints_on_disk(cwd)[-1]} of {STEPS}" in done.errors[0]


def checkpoints_on_disk(cwd: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (cwd / "artifacts" / ".work").glob("model-*/step-*"))


def test_ctrl_c_stops_with_a_checkpoint(tmp_path: Path, untouched: dict[str, str]) -> None:
    running = start(*LONG, *WORLD, cwd=tmp_path)
    at_checkpoint(running, 1)
    os.killpg(running.process.pid, signal.SIGINT)  # A terminal sends it to the whole foreground group.
    done = running.wait()
    running.nothing_left()
    stopped_in_order(done, tmp_path, code=130)
    told = valid_manifest(tmp_path)
    assert stage(told, "model")["seconds"] > 0, "what it has cost so far"
    assert told["totals"]["energy_kwh"] is None, "no meter: unknown, not zero"
    again(tmp_path, wanted=untouched)


def test_ctrl_c_under_mpirun_itself(tmp_path: Path) -> None:
    """mpirun turns Ctrl-C into SIGTERM for its ranks and takes the time that a checkpoint needs, or ends them: nothing may be left."""
    running = start(*LONG, cwd=tmp_path, launcher=(*MPIRUN, "-np", "2"))
    at_checkpoint(running, 1)
    os.kill(running.process.pid, signal.SIGINT)
    done = running.wait()
    assert done.code != 0, done.text
    running.nothing_left()
    assert valid_manifest(tmp_path)["status"] in ("interrupted", "failed", "running")
    assert checkpoints_on_disk(tmp_path)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """The first one waits for the step under way, which here never ends."""
    stuck = ("data=pictures", f"+data.wait_at_sample=[100,{tmp_path / 'reached'}]", "fit.checkpoint_every_steps=1")
    running = start(*LONG, *WORLD, *stuck, cwd=tmp_path)
    wait_for(
        lambda: (tmp_path / "reached").exists() or running.process.poll() is not None, what="the step that never ends"
    )
    running.process.send_signal(signal.SIGINT)
    wait_for(
        lambda: "Press Ctrl-C again" in running.err.read_text(errors="replace"),
        what="the answer to the first Ctrl-C",
        timeout_s=20,
    )
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    done = running.wait()
    assert done.code == 130, done.text
    assert "Traceback" not in done.err, done.text
    running.nothing_left()
    assert valid_manifest(tmp_path)["status"] in ("interrupted", "running")
    assert weights(tmp_path) == {}


def test_two_jobs_do_not_make_the_same_artifact(forks: Forks, tmp_path: Path) -> None:
    first = start(*LONG, cwd=tmp_path)
    at_checkpoint(first, 1)
    os.kill(first.process.pid, signal.SIGSTOP)  # It holds the stage while the second one asks for it.
    try:
        second = forks.run(*LONG, cwd=tmp_path)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert second.code == 6, second.text
    assert len(second.errors) == 1, second.text
    assert (
        f"another job is making model-{next(iter((tmp_path / 'artifacts' / '.work').glob('model-*.lock'))).stem.split('-')[1]}"
        in second.err
    )
    assert f"process {first.process.pid} on " in second.err
    done = first.wait()
    assert done.code == 0, done.text
    assert len(weights(tmp_path)) == 1
    third = forks.run(*LONG, cwd=tmp_path)
    assert third.code == 0, third.text
    assert stage(manifest(tmp_path), "model")["status"] == "reused"


def test_killed_while_publishing_leaves_no_half_artifact(forks: Forks, tmp_path: Path) -> None:
    """Killed when the weights lie in the staging directory, as soon as it holds its first file."""
    wide = (
        *TINY,
        "model=mlp",
        "model.hidden=[3000,3000]",
        "fit.epochs=1",
        "fit.checkpoint_every_steps=10",
    )  # 36 MB take a moment
    for attempt in range(3):
        running = start(*wide, cwd=tmp_path)
        ended = running.process.poll
        wait_for(
            lambda ended=ended: next((tmp_path / "artifacts").glob(".staging-model-*/*"), None) or ended() is not None,
            what="the first file of the artifact",
        )
        running.process.kill()
        if running.wait().code == -signal.SIGKILL:
            break
        shutil.rmtree(tmp_path / "artifacts")  # It was quicker.
        assert attempt < 2, "the job was never caught while it published"
    for path in (tmp_path / "artifacts").glob("model-*"):
        assert (path / "artifact.json").is_file(), "what is visible is whole"
    done = forks.run(*wide, cwd=tmp_path)
    assert done.code == 0, done.text
    assert stage(valid_manifest(tmp_path), "model")["status"] in ("ran", "reused")
    assert len(weights(tmp_path)) == 1
    once_more = forks.run(*wide, cwd=tmp_path)
    assert stage(manifest(tmp_path), "model")["status"] == "reused", once_more.text
