"""A worker of a parameter server that dies on another host than the first is dropped; the hosts are network namespaces."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, hosts, why_not
from tests.integration.support import LIMIT_S, events, left_behind, ranks, stage, valid_manifest, wait_for
from tests.integration.test_launch_hosts import checkpoints, start
from tests.integration.test_lost_worker import WORK, exchange

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=why_not() or ""), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


def test_the_others_go_on_without_a_worker_of_another_host(two: Hosts, tmp_path: Path) -> None:
    # Ranks 0 and 1 on the first host; 2, a worker, and 3, the server, on the second.
    listed = f"[{two.names[0]}:2,{two.names[1]}:2]"
    job = (*WORK, "strategy.consistency=async", "launch.controller=mpi")
    running = start(two, *job, cwd=tmp_path, listed=listed)
    wait_for(
        lambda: checkpoints(tmp_path) or running.process.poll() is not None, what="a checkpoint", timeout_s=LIMIT_S
    )
    assert running.process.poll() is None, running.err.read_text()
    os.kill(ranks(running.mark)[2], signal.SIGKILL)
    done = running.wait()
    assert done.code == 0, done.text
    assert "Traceback" not in done.err, done.text
    told = valid_manifest(tmp_path)
    assert told["world"] == {"size": 3, "hosts": 2, "controller": "mpi", "lost": [{"rank": 2, "host": two.names[1]}]}
    assert f"rank 2 on {two.names[1]}, a worker, has ended; the others go on without it" in done.err, done.text
    assert [one["rank"] for one in exchange(tmp_path)["lost_workers"]] == [2]
    epochs = [entry for entry in events(tmp_path) if entry["event"] == "epoch"]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3], "every epoch has all its steps"
    assert stage(told, "model")["metrics"]["steps"] == epochs[-1]["step"]
    assert left_behind(tmp_path) == []
