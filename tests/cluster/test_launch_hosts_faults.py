"""``launch=hosts`` when a rank or a host is lost while the job runs: it ends within a bounded time, and the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, hosts, why_not
from tests.integration.support import manifest, processes, stage, wait_for, weights
from tests.integration.test_launch_hosts import LONG, SMALL, Over, checkpoints, resumed, run, start

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=why_not() or ""), pytest.mark.timeout(600)]
CONTROLLERS = ("mpi", "gloo")


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


def at_work(two: Hosts, controller: str, cwd: Path) -> Over:
    """A long job after its second checkpoint in this run."""
    fast = (f"launch.controller={controller}", "launch.hosts.keepalive_s=1", "run.silent_limit_s=15")
    seen = len(checkpoints(cwd))
    running = start(two, *LONG, *fast, cwd=cwd)
    wait_for(
        lambda: len(checkpoints(cwd)) >= seen + 2 or running.process.poll() is not None,
        what="checkpoints",
        timeout_s=120,
    )
    assert running.process.poll() is None, running.err.read_text()
    return running


def rank_pid(mark: str, rank: int) -> int:
    for pid, command in processes(mark).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        names = (f"OMPI_COMM_WORLD_RANK={rank}".encode(), f"HOROVOD_RANK={rank}".encode())
        if any(name in variables for name in names) and "horovod_jobs" in command and "prte" not in command:
            return pid
    raise AssertionError(f"no rank {rank} among {processes(mark)}")


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_rank_of_the_other_host_is_killed(two: Hosts, tmp_path: Path, controller: str) -> None:
    running = at_work(two, controller, tmp_path)
    os.kill(rank_pid(running.mark, 1), signal.SIGKILL)
    done = running.wait()
    assert done.code == 9, done.text
    assert done.seconds < 30


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_host_is_cut_off_and_nothing_is_left_there(two: Hosts, tmp_path: Path, controller: str) -> None:
    running = at_work(two, controller, tmp_path)
    started = time.monotonic()
    two.cut(1)
    try:
        running.process.wait(timeout=90)
        ended_s = time.monotonic() - started
        wait_for(
            lambda: not processes(running.mark), what="the ranks of the host that was cut off to end", timeout_s=60
        )
    finally:
        two.mend(1)
    done = running.wait()
    assert done.code == 9, done.text
    assert len(done.errors) == 1, done.text
    assert "the same command goes on from the last checkpoint" in done.errors[0]
    assert ended_s < 60, done.text
    # The same command goes on from a checkpoint.
    again = at_work(two, controller, tmp_path)
    os.kill(again.launcher(), signal.SIGTERM)
    done = again.wait()
    assert done.code == 75, done.text
    assert resumed(tmp_path) >= 10


def test_what_one_controller_made_the_other_reuses(two: Hosts, tmp_path: Path) -> None:
    done = run(two, *SMALL, "launch.controller=gloo", cwd=tmp_path)
    assert done.code == 0, done.text
    made = weights(tmp_path)
    assert len(made) == 1
    done = run(two, *SMALL, "launch.controller=mpi", cwd=tmp_path)
    assert done.code == 0, done.text
    assert stage(manifest(tmp_path), "model")["status"] == "reused"
    assert weights(tmp_path) == made
