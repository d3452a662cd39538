"""Every strategy under every fault: one clear end in bounded time, nothing half-published, and the same command goes on.

The matrix is ``STRATEGIES`` x ``FAULTS``, and each strategy with a disk that is full while it publishes. More of it:
test_every_strategy_survives (a rank is killed, stopped, broken), test_elastic and test_launch_hosts_faults (a host is cut off),
tests/integration/test_faults (clocks, two launchers).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from horovod_jobs.chaos import strikes
from tests.integration.elastic import ELASTIC, events, slowly, worlds
from tests.integration.support import (
    TINY,
    WORLD,
    Running,
    check,
    left_behind,
    processes,
    run,
    stage,
    start,
    valid_manifest,
    wait_for,
    weights,
)
from tests.integration.test_bad_input import fill, small_disk
from tests.integration.test_faults import named_with_every_stack, pause, resume, schedule

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 60.0  # from a fault to the end of the job, on a machine that does ten other things
STEP_S = 0.02  # a step takes at least so long, so that a fault finds the job at work

SERVERS = (
    "strategy=parameter_server",
    "strategy.chunk_kb=2",
    "fit.sync_batchnorm=false",
    "launch=local",
    "launch.np=3",
)
STRATEGIES = {
    "local_sgd": (*WORLD, "strategy=local_sgd", "fit.sync_batchnorm=false"),
    "hierarchical": (*WORLD, "strategy.hierarchical=true"),
    "dedicated": SERVERS,
    "colocated": (*SERVERS, "strategy.servers=colocated", "launch.np=2"),
    "async": (*SERVERS, "strategy.consistency=async", "optimizer.lr=0.01"),
    "elastic": (*ELASTIC, "launch.elastic.wait_s=60"),
}
EXACT = {*STRATEGIES} - {"async"}
LONG = (*TINY, "model.dropout=0", "fit.epochs=20", "fit.checkpoint_every_steps=20")
SHORT = (
    *TINY,
    "model=mlp",
    "model.dropout=0",
    "fit.epochs=1",
)  # The best weights are written, then the model, and nothing else.
NO_SPACE = ".*No space left on device.*free some space or choose another directory"


def fill_up(disk: Path, running: Running) -> None:
    pause(running)  # What is being written at this moment must not take the space away that is being taken.
    fill(disk, leave=0)
    resume(running)


def end_everything(disk: Path, running: Running) -> None:
    for pid in processes(running.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def kill_the_launcher(disk: Path, running: Running) -> None:
    running.process.kill()


@dataclass(frozen=True)
class Fault:
    """What happens to a job at its first checkpoint, and how it then ends: exit codes, the one line of error, what the manifest says."""

    strike: Callable[[Path, Running], None]
    codes: tuple[int, ...]
    says: str | None
    status: tuple[str, ...]
    on_the_disk: tuple[str, ...] = ("artifacts",)


FAULTS = {
    # mpirun gets the signal as well: it may end before it has passed the ranks' line on, or end them before they are through.
    "SIGTERM to everything": Fault(end_everything, (75, 143), None, ("interrupted", "running")),
    "the launcher is killed": Fault(kill_the_launcher, (-signal.SIGKILL,), None, ("interrupted", "running")),
    "the store's disk is full": Fault(fill_up, (6,), f"cannot write a checkpoint to {NO_SPACE}", ("failed",)),
    "the disk of store and runs is full": Fault(
        fill_up, (6,), f"cannot write a checkpoint to {NO_SPACE}", ("running",), on_the_disk=("artifacts", "runs")
    ),
}


def place(tmp_path: Path, name: str, *, on_the_disk: tuple[str, ...] = ("artifacts",)) -> Path:
    """A working directory of which a part lies on the disk."""
    cwd, disk = tmp_path / name.replace(" ", "-"), tmp_path / "disk"
    cwd.mkdir()
    for part in on_the_disk:
        (disk / part).mkdir(exist_ok=True)
        (cwd / part).symlink_to(disk / part)
    return cwd


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a strategy's job ran that nothing happened to."""

    @cache
    def of(name: str) -> Path:
        directory = tmp_path_factory.mktemp("untouched")
        done = run(*LONG, *STRATEGIES[name], slowly(0), cwd=directory)
        assert done.code == 0, done.text
        return directory

    return of


def ends_as_untouched(name: str, whole: Path, *, cwd: Path, at_least: int) -> None:
    """The same command once more goes on, and ends in the untouched run's model."""
    done = run(*LONG, *STRATEGIES[name], slowly(0), cwd=cwd)
    assert done.code == 0, done.text
    model, wanted = (stage(valid_manifest(directory), "model") for directory in (cwd, whole))
    assert model["resumed_from_step"] >= at_least
    if name in EXACT:
        assert {*weights(cwd).values()} == {*weights(whole).values()}, "bit for bit the same"
    accuracy = wanted["metrics"]["validation_accuracy"]
    assert model["metrics"]["validation_accuracy"] == pytest.approx(accuracy, abs=0.1)
    assert len(weights(cwd)) == 1
    assert left_behind(cwd) == []


def nothing_published(cwd: Path) -> None:
    """What a rank that was killed has left half-made is hidden, and goes when the job goes on."""
    assert not [path.name for path in (cwd / "artifacts").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_under_every_fault(name: str, tmp_path: Path, untouched: Callable[[str], Path]) -> None:
    whole, disk, steps = untouched(name), tmp_path / "disk", 0
    with small_disk(disk, options="size=3m"):
        for what, fault in FAULTS.items():
            cwd = place(tmp_path, what, on_the_disk=fault.on_the_disk)
            running = start(*LONG, *STRATEGIES[name], slowly(STEP_S), cwd=cwd)
            steps = at_checkpoint(running, after=steps)
            fault.strike(disk, running)
            began = time.monotonic()
            done = running.wait(timeout_s=LIMIT_S)
            running.nothing_left()
            print(f"{name}: {what}: {time.monotonic() - began:.1f} s", flush=True)
            (disk / "filler").unlink(missing_ok=True)
            assert done.code in fault.codes, done.text
            assert "Traceback" not in done.err, done.text
            if fault.says is not None:
                check(done, code=done.code, pattern=fault.says)
                assert left_behind(cwd) == []
            assert valid_manifest(cwd)["status"] in fault.status, done.text
            nothing_published(cwd)
        ends_as_untouched(name, whole, cwd=place(tmp_path, "again"), at_least=steps)


def at_checkpoint(running: Running, *, after: int) -> int:
    """Wait for a checkpoint of a step after this one; gives its step."""

    def look() -> int | None:
        assert running.process.poll() is None, running.err.read_text(errors="replace")
        steps = [entry["step"] for entry in events(running.directory, "checkpoint") if entry["step"] > after]
        return steps[0] if steps else None

    return wait_for(look, what="a checkpoint")


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    directory = tmp_path_factory.mktemp("short")
    done = run(*SHORT, cwd=directory)
    assert done.code == 0, done.text
    (path,) = directory.glob("artifacts/model-*/model.safetensors")
    return path.stat().st_size


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_disk_that_is_full_while_publishing(name: str, tmp_path: Path, model_bytes: int) -> None:
    job, disk = (*SHORT, *STRATEGIES[name]), tmp_path / "disk"
    with small_disk(disk, options="size=3m"):
        cwd = place(tmp_path, "job")
        fill(disk, leave=model_bytes + model_bytes // 2)
        done = run(*job, cwd=cwd)
        check(done, code=6, pattern=f"cannot write the model to {NO_SPACE}")
        assert valid_manifest(cwd)["status"] == "failed"
        nothing_published(cwd)
        assert left_behind(cwd) == []
        (disk / "filler").unlink()
        again = run(*job, cwd=cwd)
        assert again.code == 0, again.text
        assert len(weights(cwd)) == 1
        assert left_behind(cwd) == []


def test_an_exception_in_an_elastic_rank_is_a_loss(tmp_path: Path, untouched: Callable[[str], Path]) -> None:
    """It shows its traceback and is replaced; after too many losses the job ends, and names the last one."""
    whole, faults = untouched("elastic"), [("exception", 1, 30), ("exception", 0, 70)]
    chaos = ("launch.elastic.reset_limit=1", "chaos=kills", schedule(*faults))
    done = run(*LONG, *STRATEGIES["elastic"], slowly(0), *chaos, cwd=tmp_path)
    assert done.code == 9, done.text
    for number, (_, rank, _) in enumerate(faults):
        assert f"RuntimeError: chaos: fault {number} strikes rank {rank}" in done.err, done.text
    struck = strikes(tmp_path / "runs" / "chaos.jsonl")
    assert [(entry["fault"], entry["rank"], entry["step"]) for entry in struck] == faults
    assert worlds(tmp_path) == [2, 2], "it was replaced once"
    (error,) = done.errors
    assert "ranks were lost 2 times, more than launch.elastic.reset_limit=1 (the last: rank 0 on localhost" in error
    assert valid_manifest(tmp_path)["status"] == "failed"
    nothing_published(tmp_path)
    ends_as_untouched("elastic", whole, cwd=tmp_path, at_least=60)


@pytest.mark.parametrize(("controller", "fault", "lost"), [("gloo", "stop", 0), ("mpi", "hang", 0)])
def test_a_rank_that_does_not_come_is_named_with_every_stack(
    controller: str, fault: str, lost: int, tmp_path: Path
) -> None:
    named_with_every_stack(controller, fault, lost=lost, directory=tmp_path)
