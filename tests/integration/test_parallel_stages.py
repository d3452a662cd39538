"""Members of an ensemble side by side, each on a part of the ranks: the same models, and the same manners when something goes wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from horovod_jobs.data.base import Batch
from tests.integration.support import (
    TINY,
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

# Two members; dropout draws its masks by rank, so models that are the same in every world have none.
PAIR = (
    *TINY,
    "graph=ensemble",
    "model.dropout=0",
    "stages.teacher_c.enabled=false",
    *(f"stages.eval_{name}.enabled=false" for name in "abc"),
)
LONG = (*PAIR, "fit.epochs=150", "fit.checkpoint_every_steps=50", "fit.validate_every_epochs=0", "fit.ema_decay=0.9")
TWO = ("launch=local", "launch.np=2", "run.parallel_stages=2")
MEMBERS = ("teacher_a", "teacher_b")


class BreaksAfter:
    """A loss with a bug that shows after some steps, on every rank or on one."""

    def __init__(self, *, calls: int, rank: int | None = None) -> None:
        self._left = calls if rank is None or os.environ["OMPI_COMM_WORLD_RANK"] == str(rank) else -1

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        self._left -= 1
        if self._left == 0:
            raise LookupError("this member has a bug")
        return nn.functional.cross_entropy(outputs, batch.targets, reduction="none")


def closest(first: Path, second: Path) -> float:
    """The largest difference of any weight of any model; the models must be the same by name."""
    ours, theirs = (sorted(store.glob("model-*/model.safetensors")) for store in (first, second))
    assert [path.parent.name for path in ours] == [path.parent.name for path in theirs], "the same fingerprints"
    assert ours
    pairs = [(load_file(a), load_file(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a[name].double() - b[name].double()).abs().max()) for a, b in pairs for name in a)


def times(cwd: Path, event: str) -> dict[str, float]:
    """When each stage told of something, the last time."""
    return {entry["stage"]: entry["time"] for entry in events(cwd) if entry["event"] == event}


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The members made by one process, one after the other."""
    directory = tmp_path_factory.mktemp("alone")
    done = forks.run(*PAIR, "run.parallel_stages=2", cwd=directory)
    assert done.code == 0, done.text
    assert times(directory, "stage_end")["teacher_a"] <= times(directory, "stage_start")["teacher_b"]
    return directory


@pytest.fixture(scope="module")
def untouched(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the long members that nobody disturbs: a part of one rank computes what one process does."""
    directory = tmp_path_factory.mktemp("untouched")
    done = forks.run(*LONG, cwd=directory)
    assert done.code == 0, done.text
    return weights(directory)


def test_two_members_on_a_rank_each(alone: Path, forks: Forks, tmp_path: Path) -> None:
    done = run(*PAIR, *TWO, "tracker=tensorboard", "fit.log_every_steps=5", cwd=tmp_path)
    assert done.code == 0, done.text
    assert weights(tmp_path) == weights(alone), "a part of one rank makes the same file as one process"
    told = valid_manifest(tmp_path)
    assert {name: stage(told, name)["status"] for name in MEMBERS} == dict.fromkeys(MEMBERS, "ran")
    assert stage(told, "teacher_b")["reason"] == "no artifact yet; on rank 1 of 2, beside teacher_a"
    assert stage(told, "teacher_b")["metrics"]["steps"] == 20
    begun, ended = times(tmp_path, "stage_start"), times(tmp_path, "stage_end")
    assert max(begun.values()) < min(ended.values()), "they ran at the same time"
    epochs = [entry["stage"] for entry in events(tmp_path) if entry["event"] == "epoch"]
    assert sorted(epochs) == sorted([*MEMBERS, *MEMBERS]), "rank 0 keeps the news of all"
    assert len(run_directories(tmp_path)) == 1
    assert left_behind(tmp_path) == []
    for name in MEMBERS:
        assert f"{name}: epoch 2 of 2" in done.err, "the console tells of every stage"
    scalars = next((tmp_path / "runs" / "latest" / "tensorboard").glob("events*")).read_bytes()
    assert all(f"{name}/train_loss".encode() in scalars for name in MEMBERS)
    again = forks.run(*PAIR, cwd=tmp_path)
    assert again.code == 0, again.text
    assert {name: stage(manifest(tmp_path), name)["status"] for name in MEMBERS} == dict.fromkeys(MEMBERS, "reused")


@pytest.mark.parametrize(("ranks", "controller"), [(4, "mpi"), (3, "gloo")])
def test_parts_of_several_ranks(ranks: int, controller: str, alone: Path, tmp_path: Path) -> None:
    """Process sets, with synchronised batch norm inside each part."""
    world = ("launch=local", f"launch.np={ranks}", f"launch.controller={controller}", "run.parallel_stages=2")
    done = run(*PAIR, *world, cwd=tmp_path)
    assert done.code == 0, done.text
    assert valid_manifest(tmp_path)["world"] == {"size": ranks, "hosts": 1, "controller": controller}
    assert stage(manifest(tmp_path), "teacher_a")["reason"].endswith(f"on ranks 0 and 1 of {ranks}, beside teacher_b")
    assert closest(tmp_path / "artifacts", alone / "artifacts") < 1e-5
    assert left_behind(tmp_path) == []


def test_the_plan_tells_which_stages_run_side_by_side(tmp_path: Path) -> None:
    done = run(*TINY, "graph=ensemble", "plan=true", *TWO, cwd=tmp_path)
    assert done.code == 0, done.text
    rows = {line.split("│")[1].strip(): line for line in done.out.splitlines() if line.count("│") > 4}
    assert "beside teacher_b" in rows["teacher_a"]
    assert "beside teacher_a" in rows["teacher_b"]
    assert "beside" not in rows["teacher_c"], "two ranks have room for two"
    assert "beside" not in rows["eval_a"], "latency is measured on a quiet host"


def test_the_footprint_of_a_host_is_divided(tmp_path: Path) -> None:
    replay = ("footprint=replay", "footprint.trace=[[0,3600.0]]")
    done = run(*PAIR, *TWO, *replay, "fit.epochs=10", cwd=tmp_path)
    assert done.code == 0, done.text
    told = valid_manifest(tmp_path)
    for name in MEMBERS:
        entry = stage(told, name)
        assert entry["energy_kwh"] == pytest.approx(entry["seconds"] / 1000 / 2, rel=0.1), "half of 3600 W"
        assert entry["footprint_method"] == "replayed: recorded power trace; 1 of the host's 2 ranks"


def at_checkpoints(running: Running, count: int) -> None:
    """Wait until every member has told of so many checkpoints."""

    def look() -> bool:
        assert running.process.poll() is None, running.err.read_text(errors="replace")
        found = [path for path in run_directories(running.directory) if path not in running.before]
        told = [entry for path in found for entry in events(running.directory, run=path.name)]
        steps = [entry["stage"] for entry in told if entry["event"] == "checkpoint"]
        return all(steps.count(name) >= count for name in MEMBERS)

    wait_for(look, what=f"checkpoint {count} of {', '.join(MEMBERS)}")


def goes_on(cwd: Path, *, wanted: dict[str, str]) -> None:
    """The same command once more ends where undisturbed members do."""
    done = run(*LONG, *TWO, cwd=cwd)
    assert done.code == 0, done.text
    told = valid_manifest(cwd)
    assert told["status"] == "done"
    for name in MEMBERS:
        assert stage(told, name)["resumed_from_step"] >= 50, name
    assert weights(cwd) == wanted, "bit for bit the same"
    assert left_behind(cwd) == []
    assert not list((cwd / "artifacts" / ".work").glob("model-*/step-*"))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_killed_rank_costs_no_more_than_the_last_checkpoints(
    rank: int, tmp_path: Path, untouched: dict[str, str]
) -> None:
    running = start(*LONG, *TWO, cwd=tmp_path)
    at_checkpoints(running, 2)
    os.kill(running.ranks()[rank], signal.SIGKILL)
    done = running.wait()
    assert done.code != 0, done.text
    assert "Traceback" not in done.err, done.text
    running.nothing_left()
    assert valid_manifest(tmp_path)["status"] in ("running", "failed", "interrupted")
    goes_on(tmp_path, wanted=untouched)


def test_sigterm_stops_both_with_a_checkpoint(tmp_path: Path, untouched: dict[str, str]) -> None:
    running = start(*LONG, *TWO, cwd=tmp_path)
    at_checkpoints(running, 1)
    os.kill(running.ranks()[1], signal.SIGTERM)  # One rank of one part is told; all stop.
    done = running.wait()
    running.nothing_left()
    assert done.code == 75, done.text
    assert "Traceback" not in done.err, done.text
    assert len(done.errors) == 1, done.text
    told = valid_manifest(tmp_path)
    assert (told["status"], told["exit_code"]) == ("interrupted", 75)
    for name in MEMBERS:
        assert f"in stage {name} after step" in done.errors[0]
        assert stage(told, name)["status"] == "pending"
    goes_on(tmp_path, wanted=untouched)


def test_a_loss_that_is_not_finite_stops_the_member_beside_it_in_order(tmp_path: Path) -> None:
    # Weights beyond what float32 holds, after a step or two.
    broken = "stages.teacher_b.optimizer={_target_: torch.optim.SGD, lr: 1.0e+38}"
    done = run(*LONG, "fit.epochs=2000", *TWO, broken, cwd=tmp_path)
    assert done.code == 8, done.text
    assert "Traceback" not in done.err, done.text
    assert len(done.errors) == 1, done.text
    assert "the loss is not finite in stage teacher_b" in done.errors[0]
    assert "(stage teacher_b ran on rank 1 of 2)" in done.errors[0]
    told = valid_manifest(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 8)
    assert stage(told, "teacher_b")["status"] == "failed"
    assert stage(told, "teacher_a")["status"] == "pending"
    assert "because stage teacher_b beside it failed" in stage(told, "teacher_a")["reason"]
    assert weights(tmp_path) == {}
    kept = {path.parent.name for path in (tmp_path / "artifacts" / ".work").glob("model-*/step-*")}
    assert len(kept) == 1, "the other one has a checkpoint"
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("ranks", "where"), [(2, "null"), (4, "null"), (4, "3")])
def test_a_bug_in_one_member_leaves_no_rank_hanging(ranks: int, where: str, tmp_path: Path) -> None:
    """An exception that is not ours: in a part of one rank, on every rank of a part of two, and on one of the two."""
    bug = f"{{_target_: tests.integration.test_parallel_stages.BreaksAfter, calls: 60, rank: {where}}}"
    world = ("launch=local", f"launch.np={ranks}", "run.parallel_stages=2")
    done = run(*LONG, "fit.epochs=2000", *world, f"stages.teacher_b.loss={bug}", cwd=tmp_path)
    assert done.code not in (0, 75), done.text
    assert "LookupError: this member has a bug" in done.err
    told = valid_manifest(tmp_path)
    assert told["status"] in ("failed", "running")
    assert stage(told, "teacher_b")["status"] in ("failed", "running")
    assert weights(tmp_path) == {}
    kept = {path.parent.name for path in (tmp_path / "artifacts" / ".work").glob("model-*/step-*")}
    assert len(kept) == 2, "both have a checkpoint, the other one that of its stop"


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_number_of_stages_that_is_none(value: str, forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*PAIR, f"run.parallel_stages={value}", cwd=tmp_path)
    assert done.code == 2, done.text
    assert f"run.parallel_stages={value} is not a number of stages; use 1 or more" in done.errors[0]
