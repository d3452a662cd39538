"""Jobs with ranks that only serve, from the command line: they end with the job, however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.support import (
    MPIRUN,
    TINY,
    Forks,
    Running,
    events,
    left_behind,
    run,
    run_directories,
    stage,
    start,
    valid_manifest,
    wait_for,
    weights,
)

SERVED = (*TINY, "strategy=parameter_server", "strategy.chunk_kb=2", "model.dropout=0")
THREE = ("launch=local", "launch.np=3")
LONG = (*SERVED, "fit.epochs=8", "fit.checkpoint_every_steps=10")

ADAFACTOR = ("optimizer._target_=torch.optim.Adafactor", "~optimizer.momentum", "~optimizer.nesterov")


def curve(directory: Path) -> list[float]:
    return [entry["train_loss"] for entry in events(directory) if entry["event"] == "epoch"]


def checkpointed(running: Running) -> bool:
    """Whether this job has told of a checkpoint."""
    new = [path.name for path in run_directories(running.directory) if path not in running.before]
    return any(entry["event"] == "checkpoint" for name in new for entry in events(running.directory, run=name))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of two workers that nobody disturbs."""
    directory = tmp_path_factory.mktemp("untouched")
    done = run(*LONG, *THREE, cwd=directory)
    assert done.code == 0, done.text
    return weights(directory)


def test_two_workers_and_a_server_train_what_one_process_trains(forks: Forks, tmp_path: Path) -> None:
    alone, served = tmp_path / "alone", tmp_path / "served"
    alone.mkdir()
    served.mkdir()
    single = forks.run(*TINY, "model.dropout=0", cwd=alone)
    assert single.code == 0, single.text
    done = run(*SERVED, *THREE, cwd=served)
    assert done.code == 0, done.text
    assert valid_manifest(served)["world"] == {"size": 2, "hosts": 1, "controller": "mpi"}
    assert curve(served) == pytest.approx(curve(alone), rel=1e-4)
    assert left_behind(served) == []
    again = run(*SERVED, *THREE, cwd=served)
    assert again.code == 0, again.text
    assert stage(valid_manifest(served), "model")["status"] == "reused", "servers leave a job without training as well"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 75, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_job_goes_on_with_another_number_of_servers(
    number: signal.Signals, code: int, untouched: dict[str, str], tmp_path: Path
) -> None:
    running = start(*LONG, *THREE, cwd=tmp_path)
    wait_for(lambda: checkpointed(running), what="a checkpoint")
    os.kill(running.process.pid, number)
    done = running.wait()
    running.nothing_left()
    assert done.code == code, done.text
    more = run(*LONG, "launch=local", "launch.np=4", "strategy.servers=2", cwd=tmp_path)
    assert more.code == 0, more.text
    assert stage(valid_manifest(tmp_path), "model")["resumed_from_step"] > 0
    assert weights(tmp_path) == untouched


@pytest.mark.parametrize("rank", [1, 2], ids=["a worker", "the server"])
def test_a_rank_that_dies_ends_the_job_and_the_last_checkpoint_is_whole(
    rank: int, untouched: dict[str, str], tmp_path: Path
) -> None:
    running = start(*LONG, *THREE, cwd=tmp_path)
    wait_for(lambda: checkpointed(running), what="a checkpoint")
    os.kill(running.ranks()[rank], signal.SIGKILL)
    done = running.wait()
    running.nothing_left()
    assert done.code == 9, done.text
    assert f"rank {rank}" in done.err, done.text
    more = run(*LONG, "launch=local", "launch.np=2", "strategy.servers=colocated", cwd=tmp_path)
    assert more.code == 0, more.text
    assert stage(valid_manifest(tmp_path), "model")["resumed_from_step"] > 0
    assert weights(tmp_path) == untouched


def test_a_worker_that_dies_beside_a_colocated_server_is_named(tmp_path: Path) -> None:
    """Each holds a part of the parameters, so nobody goes on without it, however loosely they are coupled."""
    out_of_step = ("strategy.consistency=async", "strategy.servers=colocated", "fit.sync_batchnorm=false")
    running = start(*LONG, "launch=local", "launch.np=3", *out_of_step, cwd=tmp_path)
    wait_for(lambda: checkpointed(running), what="a checkpoint")
    os.kill(running.ranks()[1], signal.SIGKILL)
    done = running.wait()
    running.nothing_left()
    assert done.code == 9, done.text
    assert "error: rank 1 (process " in done.err, done.text
    assert "was ended from outside" in done.err


@pytest.mark.parametrize(
    ("overrides", "code", "told"),
    [
        (("launch=local", "launch.np=2", "strategy.servers=2"), 2, "strategy.servers=2 leaves no worker of 2 ranks"),
        ((*THREE, "launch.controller=gloo"), 2, "needs MPI, and these ranks are joined by Gloo"),
        (("launch=none",), 2, "strategy.servers=1 leaves no worker of 1 rank; start at least 2"),
        ((*THREE, *ADAFACTOR), 2, "looks at a parameter as a whole"),
        ((*THREE, "+data.not_finite=7", "strategy.consistency=async", "fit.sync_batchnorm=false"), 8, "training samples"),
    ],
    ids=["ranks", "gloo", "one process", "optimizer", "not finite"],
)  # fmt: skip
def test_what_cannot_work_is_told_once_and_ends_every_rank(
    overrides: tuple[str, ...], code: int, told: str, tmp_path: Path
) -> None:
    done = run(*SERVED, *overrides, cwd=tmp_path)
    assert done.code == code, done.text
    assert len(done.errors) == 1, done.text
    assert told in done.errors[0]
    assert "Traceback" not in done.err


def test_stages_that_want_different_numbers_of_servers_are_refused(forks: Forks, tmp_path: Path) -> None:
    strategy = "{_target_: horovod_jobs.strategy.parameter_server.ParameterServer, servers: 2}"
    done = forks.run(*SERVED, "graph=pair", f"stages.student.strategy={strategy}", *THREE, cwd=tmp_path)
    assert done.code == 2, done.text
    assert "ranks are set aside once for the whole job" in done.errors[0]


def test_gloo_ranks_are_refused_in_the_world(tmp_path: Path) -> None:
    done = run(*SERVED, cwd=tmp_path, launcher=("horovodrun", "--gloo", "-np", "2"))
    assert done.code != 0
    assert "needs MPI, and these ranks are joined by Gloo" in done.err


def test_a_server_with_another_config_is_named(tmp_path: Path) -> None:
    job = ("-np", "1", "python", "-m", "horovod_jobs", *SERVED)
    done = run(*SERVED, "optimizer.lr=0.2", cwd=tmp_path, launcher=(*MPIRUN, *job, ":", "-np", "1"))
    assert done.code == 9, done.text
    assert "rank 1 (a parameter server) was given another config" in done.err


@pytest.mark.thorough
def test_a_sweep_keeps_its_servers(tmp_path: Path) -> None:
    done = run("-m", *SERVED, "fit.epochs=1,2", *THREE, cwd=tmp_path, launcher=())
    assert done.code == 0, done.text
    assert len(weights(tmp_path)) == 2
    inside = tmp_path / "inside"
    inside.mkdir()
    done = run("-m", *SERVED, "fit.epochs=1,2", cwd=inside, launcher=(*MPIRUN, "-np", "3"))
    assert done.code == 0, done.text
    assert len(weights(inside)) == 2
