"""``mpirun`` and ``horovodrun`` typed by hand over several hosts: the very commands of docs/gpu_cluster.md, with these hosts' names."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, hosts, why_not
from tests.integration.support import JOB, processes, stage, valid_manifest, wait_for, weights
from tests.integration.test_launch_hosts import LONG, SMALL, Over, checkpoints, in_order, resumed, start_command

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=why_not() or ""), pytest.mark.timeout(600)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu_cluster.md"
# The hosts share this checkout, which PATH alone would not find in a new process group of another host.
PASSED = {"mpirun": ["-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"], "horovodrun": []}


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


def documented(launcher: str, two: Hosts) -> list[str]:
    """The page's command up to ``horovod-jobs``, for these two hosts."""
    section = PAGE.read_text(encoding="utf-8").split(f"## By hand: {launcher}\n")[1].split("\n## ")[0]
    block = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    words = shlex.split(block.replace("\\\n", " "))
    before = words[: words.index("horovod-jobs")]
    listed = f"{two.names[0]}:2,{two.names[1]}:2"
    command = [listed if word == "host1:2,host2:2" else word for word in before]
    assert command[0] == launcher
    assert listed in command
    return [*command, *PASSED[launcher]]


def start(two: Hosts, launcher: str, *arguments: str, cwd: Path) -> Over:
    return start_command(two, [*documented(launcher, two), *JOB, *arguments], cwd=cwd)


def mpirun(mark: str) -> int:
    """Its process, which has become Open MPI 5's ``prterun``, or is still ``mpirun`` with Open MPI 4."""
    commands = {pid: command.split() for pid, command in processes(mark).items()}
    [pid] = [pid for pid, words in commands.items() if Path(words[0]).name in ("mpirun", "prterun") and "-np" in words]
    return pid


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_job_runs_and_the_same_command_reuses_it(two: Hosts, tmp_path: Path, launcher: str) -> None:
    done = start(two, launcher, *SMALL, cwd=tmp_path).wait()
    assert done.code == 0, done.text
    controller = {"mpirun": "mpi", "horovodrun": "gloo"}[launcher]
    assert valid_manifest(tmp_path)["world"] == {"size": 4, "hosts": 2, "controller": controller}
    made = weights(tmp_path)
    assert len(made) == 1
    done = start(two, launcher, *SMALL, cwd=tmp_path).wait()
    assert done.code == 0, done.text
    assert stage(valid_manifest(tmp_path), "model")["status"] == "reused"
    assert weights(tmp_path) == made


def test_mpirun_told_by_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(two: Hosts, tmp_path: Path) -> None:
    for _ in range(2):
        seen = len(checkpoints(tmp_path))
        running = start(two, "mpirun", *LONG, cwd=tmp_path)
        wait_for(lambda seen=seen: len(checkpoints(tmp_path)) >= seen + 2, what="checkpoints", timeout_s=120)
        os.kill(mpirun(running.mark), signal.SIGUSR1)
        in_order(running.wait(), tmp_path, code=75)
    assert resumed(tmp_path) >= 10
