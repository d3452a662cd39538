"""Elastic jobs for longer: every way to lose ranks, and hosts that come, go and are cut off."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, hosts, why_not
from tests.cluster.slurm_cluster import cluster
from tests.cluster.slurm_cluster import why_not as slurm_why_not
from tests.integration.elastic import (
    ELASTIC,
    EXACT,
    ROUNDED,
    at_epoch,
    events,
    hosts_script,
    journal,
    nearly_equal,
    slowly,
    tell,
    tensors,
    told,
    world,
    worlds,
)
from tests.integration.support import (
    JOB,
    WORLD,
    Running,
    environment,
    left_behind,
    processes,
    run,
    stage,
    start,
    valid_manifest,
    wait_for,
    weights,
)

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    directory = tmp_path_factory.mktemp("untouched")
    done = run(*EXACT, slowly(0), *WORLD, cwd=directory)
    assert done.code == 0, done.text
    return {"exact": {*weights(directory).values()}}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rounded")
    done = run(*ROUNDED, slowly(0), *WORLD, cwd=directory)
    assert done.code == 0, done.text
    return directory


def finish(running: Running, *, code: int = 0) -> str:
    done = running.wait()
    running.nothing_left()
    assert done.code == code, done.text
    assert "Traceback" not in done.err, done.text
    return done.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_noticed_and_replaced(rank: int, tmp_path: Path, untouched: dict[str, set[str]]) -> None:
    running = start(
        *EXACT, slowly(0.02), *ELASTIC, "launch.elastic.wait_s=60", "launch.elastic.lease_s=3", cwd=tmp_path
    )
    ranks = world(running, 0)
    at_epoch(running, 2)
    os.kill(ranks[rank], signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for(lambda: told(tmp_path, "kill"), what="the driver to notice")
    assert time.monotonic() - stopped < 3 + 1 + 2, "the lease, the second after it, and time to look"
    world(running, 1)
    finish(running)
    (kill,) = told(tmp_path, "kill")
    assert "was silent for" in kill["why"]
    assert {*weights(tmp_path).values()} == untouched["exact"]


def test_all_ranks_lost_at_once_start_again_from_disk(tmp_path: Path, untouched: dict[str, set[str]]) -> None:
    running = start(*EXACT, slowly(0.02), *ELASTIC, "fit.checkpoint_every_steps=20", cwd=tmp_path)
    ranks = world(running, 0)
    at_epoch(running, 5)
    for pid in ranks.values():
        os.kill(pid, signal.SIGKILL)
    assert not set(world(running, 1).values()) & set(ranks.values())
    finish(running)
    assert all(entry["step"] % 20 == 0 and entry["step"] >= 40 for entry in events(tmp_path, "resume"))
    assert {*weights(tmp_path).values()} == untouched["exact"]


def test_the_driver_killed_leaves_nobody_and_the_same_command_goes_on(
    tmp_path: Path, untouched: dict[str, set[str]]
) -> None:
    command = (*EXACT, slowly(0.02), *ELASTIC, "fit.checkpoint_every_steps=20")
    running = start(*command, cwd=tmp_path)
    world(running, 0)
    at_epoch(running, 5)
    running.process.kill()
    running.wait()
    running.nothing_left(timeout_s=60)
    assert weights(tmp_path) == {}
    finish(start(*command, cwd=tmp_path))
    assert stage(valid_manifest(tmp_path), "model")["resumed_from_step"] >= 40
    assert {*weights(tmp_path).values()} == untouched["exact"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_is_in_order_and_the_same_command_goes_on(
    number: signal.Signals, code: int, tmp_path: Path, untouched: dict[str, set[str]]
) -> None:
    running = start(*EXACT, slowly(0.02), *ELASTIC, cwd=tmp_path)
    world(running, 0)
    at_epoch(running, 3)
    running.process.send_signal(number)
    assert "the same command goes on from here" in finish(running, code=code)
    told_of = valid_manifest(tmp_path)
    assert (told_of["status"], told_of["exit_code"]) == ("interrupted", code)
    finish(start(*EXACT, slowly(0.02), *ELASTIC, cwd=tmp_path))
    assert {*weights(tmp_path).values()} == untouched["exact"]


def test_a_signal_to_one_rank_is_its_leave(tmp_path: Path, rounded: Path) -> None:
    running = start(*ROUNDED, slowly(0.03), *ELASTIC, "launch.elastic.cooldown_s=600", cwd=tmp_path)
    ranks = world(running, 0)
    at_epoch(running, 3)
    os.kill(ranks[0], signal.SIGTERM)
    assert world(running, 1) == {0: ranks[1]}
    finish(running)
    assert told(tmp_path, "end")[0]["losses"] == 0
    assert nearly_equal(tensors(tmp_path), tensors(rounded))


def test_the_reset_limit_ends_the_job_with_a_clear_error(tmp_path: Path) -> None:
    running = start(
        *EXACT, slowly(0.02), *ELASTIC, "launch.elastic.reset_limit=1", "launch.elastic.wait_s=60", cwd=tmp_path
    )
    for number in range(2):
        ranks = world(running, number)
        at_epoch(running, 1 + 3 * number)
        os.kill(ranks[1], signal.SIGKILL)
    said = finish(running, code=9)
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "ranks were lost 2 times, more than launch.elastic.reset_limit=1" in error
    assert "rank 1 on localhost was ended by signal 9" in error


def test_a_job_that_cannot_work_ends_at_once_with_its_own_code(tmp_path: Path) -> None:
    running = start(*EXACT, slowly(0.02), *ELASTIC, "+data.not_finite=100", cwd=tmp_path)
    said = finish(running, code=8)
    assert "not finite" in said
    assert worlds(tmp_path) == [2]
    again = start(*EXACT, slowly(0.02), *ELASTIC, "fit.batch_per_rank=3", cwd=tmp_path)
    assert "use fit.global_batch" in finish(again, code=2)


def test_a_storm_of_kills(tmp_path: Path, untouched: dict[str, set[str]]) -> None:
    """Six kills of either rank, some in the middle of forming a world: the weights are the same to the last bit."""
    import random

    dice = random.Random(5)
    running = start(*EXACT, slowly(0.1), *ELASTIC, "launch.elastic.wait_s=60", "launch.elastic.reset_limit=100",
                    "fit.checkpoint_every_steps=20", "strategy.commit_every_steps=3", cwd=tmp_path)  # fmt: skip
    world(running, 0)
    at_epoch(running, 1)
    for _ in range(6):
        before = len(worlds(tmp_path))
        alive = {entry["member"]: entry["pid"] for entry in told(tmp_path, "start")}
        for entry in told(tmp_path, "gone"):
            alive.pop(entry["member"], None)
        os.kill(dice.choice(sorted(alive.values())), signal.SIGKILL)
        if dice.random() < 0.5:
            wait_for(
                lambda before=before: len(worlds(tmp_path)) > before or running.process.poll() is not None,
                what="a new world",
            )
        time.sleep(dice.random())
        if running.process.poll() is not None:
            break
    finish(running)
    assert told(tmp_path, "end")[0]["losses"] >= 3
    assert {*weights(tmp_path).values()} == untouched["exact"]
    assert left_behind(tmp_path) == []


# --- several hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


def over_hosts(made: Hosts, cwd: Path, *arguments: str) -> Running:
    """The job, started on the first host."""
    mark = f"hosts-{cwd.name}"
    out, err = cwd / "out.txt", cwd / "err.txt"
    with out.open("wb") as output:
        process = made.start(
            [
                "env",
                "-C",
                str(cwd),
                "sh",
                "-c",
                'exec "$@" 2>err.txt',
                "sh",
                sys.executable,
                "-m",
                "horovod_jobs",
                *arguments,
            ],
            env=environment(mark, HOME=os.environ.get("HOME", "/root")),
            output=output.fileno(),
        )
    return Running(process, cwd, mark, out, err, time.monotonic(), [])  # type: ignore[arg-type]


HOSTED = ("strategy=elastic", "launch=hosts", "launch.hosts.interface=eth0", "launch.elastic.beat_s=0.2", "launch.elastic.lease_s=4",
          "launch.elastic.gloo_timeout_s=6", "launch.elastic.cooldown_s=1", "launch.elastic.discovery_every_s=0.5",
          "launch.hosts.keepalive_s=2")  # fmt: skip


@needs_hosts
def test_a_host_joins_is_cut_off_and_comes_back(two: Hosts, tmp_path: Path, rounded: Path) -> None:
    first, second = two.names
    known = tmp_path / "known"
    script = hosts_script(known, f"{first}:1")
    endless = (*ROUNDED, slowly(0.02), "fit.epochs=100000", "fit.checkpoint_every_steps=50")
    running = over_hosts(two, tmp_path, *endless, *HOSTED, f"launch.elastic.discovery={script}", "launch.np=2")
    try:
        assert len(world(running, 0)) == 1
        at_epoch(running, 1)
        tell(known, f"{first}:1\n{second}:1")
        assert len(world(running, 1)) == 2
        at_epoch(running, max(entry["epoch"] for entry in events(tmp_path, "epoch")) + 2)
        two.cut(1)
        cut = time.monotonic()
        assert len(world(running, 2)) == 1
        assert time.monotonic() - cut < 4 + 1 + 6 + 5, "the lease, or Gloo's time limit, and a little"
        two.mend(1)
        assert len(world(running, 3)) == 2, "it is taken back"
        at_epoch(running, max(entry["epoch"] for entry in events(tmp_path, "epoch")) + 2)
        running.process.terminate()  # The job gets SIGTERM when what leads to its host has ended.
        wait_for(lambda: not processes(running.mark), what="all ranks to end", timeout_s=60)
    finally:
        two.mend(1)
        running.kill()
    assert worlds(tmp_path) == [1, 2, 1, 2]
    assert all(rank["host"] in (first, second) for entry in told(tmp_path, "world") for rank in entry["ranks"])
    manifest = valid_manifest(tmp_path)
    assert (manifest["status"], manifest["exit_code"]) == ("interrupted", 75)
    end = journal(tmp_path)[-1]
    assert (end["event"], end["code"], end["losses"]) == ("end", 75, 1)


# --- inside a Slurm job -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(slurm_why_not() is not None, reason=slurm_why_not() or "")
def test_the_nodes_of_a_slurm_job_are_discovered(tmp_path: Path) -> None:
    elastic = (
        *ROUNDED,
        *HOSTED[:2],
        "launch.hosts.interface=lo",
        "launch.elastic.discovery=slurm",
        "launch.elastic.slots=2",
        "launch.np=2",
    )
    with cluster() as slurm:
        command = shlex.join(["env", "-C", str(tmp_path), *JOB, *elastic])
        output = tmp_path / "slurm.out"
        made = environment("", SLURM_CONF=slurm.environment()["SLURM_CONF"])
        done = subprocess.run(["sbatch", "--wait", "-n", "2", "-o", str(output), "--wrap", command], env=made, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{output.read_text()}"
    assert worlds(tmp_path) == [2]
    assert told(tmp_path, "end")[0]["code"] == 0
