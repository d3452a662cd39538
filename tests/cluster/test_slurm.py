"""``launch=slurm`` on a Slurm of this machine alone: both ways to start ranks, requeueing, preemption, cancelling, an array."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Cluster, cluster, why_not
from tests.integration.support import (
    JOB,
    TINY,
    Done,
    environment,
    events,
    manifest,
    run_directories,
    stage,
    valid_manifest,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=why_not() or ""), pytest.mark.timeout(600)]
SMALL = (*TINY, "data=digits", "model=mlp", "fit.epochs=1", "fit.max_steps=6")
# Seconds of work that a requeue in the middle does not lose.
LONG = (
    *TINY,
    "data=digits",
    "model=mlp",
    "fit.epochs=12",
    "fit.checkpoint_every_steps=20",
    "fit.validate_every_epochs=0",
)
LIMIT_S = 400.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def start(slurm: Cluster, *arguments: str, cwd: Path, wait: bool = True) -> subprocess.Popen[str]:
    command = [*JOB, *arguments, "launch=slurm", f"launch.slurm.wait={str(wait).lower()}"]
    env = environment("", SLURM_CONF=slurm.environment()["SLURM_CONF"])
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], cwd: Path) -> Done:
    out, err = process.communicate(timeout=LIMIT_S)
    printed = "".join(f"--- {path.name}\n{path.read_text()}\n" for path in sorted(cwd.glob("slurm/*.out")))
    return Done(process.returncode, out, f"{err}\n{printed}", 0.0)


def submitted(slurm: Cluster, cwd: Path) -> str:
    """The number of the job that has been submitted last and is not done."""
    return str(
        wait_for(
            lambda: slurm.run("squeue", "-h", "-o", "%A").split() or None, what="a job in the queue", timeout_s=60
        )[0]
    )


def checkpoints(cwd: Path) -> list[int]:
    return [
        entry["step"]
        for path in run_directories(cwd)
        for entry in events(cwd, run=path.name)
        if entry["event"] == "checkpoint"
    ]


def at_work(process: subprocess.Popen[str], cwd: Path, *, count: int = 2) -> None:
    wait_for(
        lambda: len(checkpoints(cwd)) >= count or process.poll() is not None, what="checkpoints", timeout_s=LIMIT_S
    )
    assert process.poll() is None, finish(process, cwd).text


@pytest.mark.parametrize("mpi", ["pmix", "mpirun"])
def test_a_job_by_either_way_and_its_exit_code(slurm: Cluster, tmp_path: Path, mpi: str) -> None:
    way = f"launch.slurm.mpi={mpi}"
    done = finish(start(slurm, *SMALL, way, cwd=tmp_path), tmp_path)
    assert done.code == 0, done.text
    assert "submitted job " in done.err
    assert "follow:  tail -F slurm/tiny-" in done.err
    told = valid_manifest(tmp_path)
    assert told["world"] == {"size": 2, "hosts": 1, "controller": "mpi"}
    assert told["command"][:2] == ["horovod-jobs", SMALL[0]]
    assert len(weights(tmp_path)) == 1
    done = finish(start(slurm, *SMALL, way, "run.store=/proc/nowhere", cwd=tmp_path), tmp_path)
    assert done.code == 6, done.text
    assert "error: " in done.err


@pytest.mark.parametrize("mpi", ["pmix", "mpirun"])
def test_a_warning_puts_the_job_back_and_it_finishes_by_itself(slurm: Cluster, tmp_path: Path, mpi: str) -> None:
    process = start(slurm, *LONG, f"launch.slurm.mpi={mpi}", cwd=tmp_path)
    at_work(process, tmp_path)
    job = submitted(slurm, tmp_path)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # What Slurm sends before the time limit.
    at_once(slurm, job)
    done = finish(process, tmp_path)
    assert done.code == 0, done.text
    went_on(slurm, done, job, tmp_path)


def test_a_controller_that_is_away_at_the_end_of_an_attempt_is_waited_for(slurm: Cluster, tmp_path: Path) -> None:
    process = start(slurm, *LONG, cwd=tmp_path)
    at_work(process, tmp_path)
    job = submitted(slurm, tmp_path)
    batch = int(slurm.run("scontrol", "listpids", job).split("\n")[1].split()[0])
    with slurm.away():
        os.kill(batch, signal.SIGUSR1)
        wait_for(lambda: "Slurm does not answer" in output(tmp_path), what="the batch script to ask", timeout_s=LIMIT_S)
    at_once(slurm, job)
    done = finish(process, tmp_path)
    assert done.code == 0, done.text
    went_on(slurm, done, job, tmp_path)


def output(cwd: Path) -> str:
    return "".join(path.read_text() for path in cwd.glob("slurm/*.out"))


def at_once(slurm: Cluster, job: str) -> None:
    """Slurm lets a requeued job wait for two minutes, so that the first attempt is surely gone; here twenty seconds are enough."""
    wait_for(
        lambda: slurm.field(job, "Restarts") == "1" and slurm.field(job, "JobState") == "PENDING",
        what="the job to be back in the queue",
        timeout_s=LIMIT_S,
    )
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+20")


def went_on(slurm: Cluster, done: Done, job: str, cwd: Path) -> None:
    """The job stopped in order at least once, was put back, and ended with the whole work done."""
    assert "attempt 1 ended with a checkpoint; the job goes back into the queue" in done.err, done.text
    assert int(slurm.field(job, "Restarts")) >= 1
    first, *_, last = run_directories(cwd)
    assert (manifest(cwd, run=first.name)["status"], manifest(cwd, run=first.name)["exit_code"]) == ("interrupted", 75)
    told = stage(manifest(cwd, run=last.name), "model")
    assert told["status"] == "ran"
    assert told["resumed_from_step"] >= 20
    assert len(weights(cwd)) == 1
    assert len(list(cwd.glob("slurm/*.out"))) == 1, "all attempts write one file"


def test_before_the_time_limit_the_job_stops_and_goes_on_in_another_attempt(slurm: Cluster, tmp_path: Path) -> None:
    """Work for hours, and a limit of a minute: that the work then ends is what the tests with a warning show."""
    process = start(slurm, *LONG, "fit.epochs=1000000", "launch.slurm.time=1", "launch.slurm.warn_s=10", cwd=tmp_path)
    job = submitted(slurm, tmp_path)
    at_once(slurm, job)
    first = run_directories(tmp_path)[0].name
    assert (manifest(tmp_path, run=first)["status"], manifest(tmp_path, run=first)["exit_code"]) == ("interrupted", 75)
    wait_for(
        lambda: any(entry["event"] == "resume" and entry["step"] >= 20 for entry in events(tmp_path)),
        what="the second attempt to go on",
        timeout_s=LIMIT_S,
    )
    assert len(run_directories(tmp_path)) == 2
    slurm.run("scancel", job)
    done = finish(process, tmp_path)
    assert slurm.field(job, "JobState") == "CANCELLED", done.text
    assert "attempt 1 ended with a checkpoint; the job goes back into the queue" in done.err


def test_a_preempted_job_goes_back_and_finishes(slurm: Cluster, tmp_path: Path) -> None:
    process = start(slurm, *LONG, "launch.slurm.partition=main", cwd=tmp_path)
    at_work(process, tmp_path)
    job = submitted(slurm, tmp_path)
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    at_once(slurm, job)
    done = finish(process, tmp_path)
    assert done.code == 0, done.text
    assert slurm.field(urgent, "JobState") == "COMPLETED"
    went_on(slurm, done, job, tmp_path)


def test_a_cancelled_job_writes_a_checkpoint_and_stays_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    process = start(slurm, *LONG, cwd=tmp_path)
    at_work(process, tmp_path)
    job = submitted(slurm, tmp_path)
    slurm.run("scancel", job)
    done = finish(process, tmp_path)
    assert done.code != 0, done.text
    assert slurm.field(job, "JobState") == "CANCELLED"
    time.sleep(12)  # A requeued job waits ten seconds before it starts again.
    assert slurm.field(job, "JobState") == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"
    assert manifest(tmp_path)["status"] == "interrupted", done.text
    assert "goes back into the queue" not in done.err, done.text


def test_a_sweep_is_one_array_whose_jobs_are_all_done(slurm: Cluster, tmp_path: Path) -> None:
    command = [*JOB, "-m", *SMALL, "seed=1,2", "launch=slurm", "launch.slurm.wait=true"]
    env = environment("", SLURM_CONF=slurm.environment()["SLURM_CONF"])
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done = finish(process, tmp_path)
    assert done.code == 0, done.text
    assert done.err.count("submitted array ") == 1
    assert "of 2 jobs" in done.err
    assert len(list(tmp_path.glob("slurm/tiny-*_*.out"))) == 2
    assert len(weights(tmp_path)) == 2, "each seed has made a model of its own"
    assert {manifest(tmp_path, run=path.name)["status"] for path in run_directories(tmp_path)} == {"done"}


def test_what_slurm_refuses_is_told_in_one_line(slurm: Cluster, tmp_path: Path) -> None:
    done = finish(start(slurm, *SMALL, "launch.slurm.partition=nowhere", cwd=tmp_path, wait=False), tmp_path)
    assert done.code == 5, done.text
    (error,) = done.errors
    assert (
        "error: sbatch refused slurm/tiny.sbatch (sbatch: error: Batch job submission failed: Invalid partition"
        in error
    )


def test_a_step_that_cannot_be_launched_is_no_success(slurm: Cluster, tmp_path: Path) -> None:
    """srun gives 0 then. What stands where PMIx wants its directory keeps it from launching."""
    last = int(slurm.run("sbatch", "--parsable", "--ntasks=1", "--output=/dev/null", "--wrap=true").strip())
    obstacles = [slurm.directory / "tmp" / f"spmix_appdir_0_{last + number}.0" for number in (1, 2, 3)]
    for path in obstacles:
        path.mkdir()
    try:
        done = finish(start(slurm, *SMALL, cwd=tmp_path), tmp_path)
    finally:
        for path in obstacles:
            path.rmdir()
    assert done.code == 5, done.text
    assert "error: no rank was started" in done.err
