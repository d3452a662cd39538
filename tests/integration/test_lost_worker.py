"""A worker of a parameter server that dies is dropped, and the job comes to its end without it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import (
    TINY,
    Done,
    Running,
    events,
    left_behind,
    run,
    stage,
    start,
    valid_manifest,
    wait_for,
)

# Epochs of 80 steps. With stale gradients the default learning rate now and then ruins a batch of 3.
WORK = (*TINY, "strategy=parameter_server", "strategy.chunk_kb=2", "model.dropout=0", "fit.sync_batchnorm=false", "fit.epochs=3",
       "fit.global_batch=3", "fit.checkpoint_every_steps=20",
        "optimizer.lr=0.01")  # fmt: skip
THREE_WORKERS = (*WORK, "launch=local", "launch.np=4")


def at_checkpoint(running: Running) -> None:
    wait_for(lambda: any(entry["event"] == "checkpoint" for entry in events(running.directory)), what="a checkpoint")


def killed(directory: Path, *overrides: str, rank: int) -> Done:
    """The job's end after a rank was killed at its first checkpoint."""
    running = start(*overrides, cwd=directory)
    at_checkpoint(running)
    os.kill(running.ranks()[rank], signal.SIGKILL)
    done = running.wait()
    running.nothing_left()
    return done


def exchange(directory: Path) -> dict[str, Any]:
    """What the trained model's record says of the exchange."""
    path = next((directory / "artifacts").glob("model-*")) / "artifact.json"
    found: dict[str, Any] = json.loads(path.read_text())["meta"]["details"]["exchange"]
    return found


@pytest.mark.parametrize("consistency", ["async", pytest.param("ssp", marks=pytest.mark.thorough)])
def test_the_others_go_on_without_a_worker_that_dies(consistency: str, tmp_path: Path) -> None:
    done = killed(tmp_path, *THREE_WORKERS, f"strategy.consistency={consistency}", rank=1)
    assert done.code == 0, done.text
    assert "Traceback" not in done.err
    told = valid_manifest(tmp_path)
    host = told["world"]["lost"][0]["host"]
    assert told["world"] == {"size": 3, "hosts": 1, "controller": "mpi", "lost": [{"rank": 1, "host": host}]}
    assert f"rank 1 on {host}, a worker, has ended; the others go on without it" in done.err, done.text
    assert [entry["rank"] for entry in events(tmp_path) if entry["event"] == "rank_lost"] == [1]
    lost = exchange(tmp_path)["lost_workers"]
    assert [one["rank"] for one in lost] == [1]
    assert 20 <= lost[0]["last_step"] < lost[0]["samples_taken_over_from_step"]
    epochs = [entry for entry in events(tmp_path) if entry["event"] == "epoch"]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3], "every epoch has all its steps"
    assert epochs[-1]["train_loss"] < 0.2 * epochs[0]["train_loss"]
    assert stage(told, "model")["metrics"]["steps"] == epochs[-1]["step"]
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("consistency", "rank"), [("async", 1), ("ssp", 3)], ids=["a worker", "the server"])
def test_a_rank_that_is_stopped_ends_the_job_in_bounded_time(consistency: str, rank: int, tmp_path: Path) -> None:
    """It is not dead, so nobody goes on without it; and mpirun, told to bear losses, does not end it."""
    settings = (f"strategy.consistency={consistency}", "run.silent_limit_s=4", "run.stall_limit_s=8")
    running = start(*THREE_WORKERS, *settings, cwd=tmp_path)
    at_checkpoint(running)
    os.kill(running.ranks()[rank], signal.SIGSTOP)
    done = running.wait(timeout_s=90)
    running.nothing_left()
    assert done.code == 9, done.text
    assert re.search(rf"rank {rank} \(host \S+, pid \d+\) gave no sign of life for 4 s", done.err), done.text
    assert valid_manifest(tmp_path)["status"] == "failed"


def test_a_worker_with_an_error_of_its_own_ends_the_job(tmp_path: Path) -> None:
    """It is not one that was killed: what is wrong with it may be wrong with the others."""
    fault = "chaos.schedule=[{fault: exception, rank: 1, step: 30, stage: model}]"
    done = run(*THREE_WORKERS, "strategy.consistency=async", "chaos=kills", fault, cwd=tmp_path)
    assert done.code == 1, done.text
    assert "Traceback" in done.err, done.text
    told = valid_manifest(tmp_path)
    assert told["status"] == "failed"
    assert re.search(r"rank 1 \(host \S+, pid \d+\) has ended with an error of its own", told["error"]), told["error"]


@pytest.mark.parametrize("rank", [3, 0], ids=["the server", "the first worker"])
def test_without_a_server_or_the_first_worker_the_job_ends_and_goes_on_later(rank: int, tmp_path: Path) -> None:
    settings = (*THREE_WORKERS, "strategy.consistency=async")
    done = killed(tmp_path, *settings, rank=rank)
    assert done.code == 9, done.text
    assert f"rank {rank} on " in done.err, done.text
    assert "Traceback" not in done.err, done.text
    if rank == 0:
        return
    more = run(*settings, cwd=tmp_path)
    assert more.code == 0, more.text
    told = valid_manifest(tmp_path)
    assert stage(told, "model")["resumed_from_step"] >= 20
    assert "lost" not in told["world"]
