"""How several stages' ends become one: which error, which statuses, and which stages may be side by side at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.config import (
    DistillStage,
    EvaluateStage,
    FitConfig,
    JobConfig,
    QuantizeStage,
    ReportStage,
    RunConfig,
    StageConfig,
)
from horovod_jobs.errors import Interrupted, InterruptedByUser, NonFiniteError, WorldError
from horovod_jobs.graph import build
from horovod_jobs.job import Job
from horovod_jobs.parallel import _description, _for_part, _outcome, _raise
from horovod_jobs.planning import Planned, Prepared
from horovod_jobs.schedule import shares
from horovod_jobs.tracking import NullTracker
from horovod_jobs.turns import in_turns, keys_of, whole_because
from tests.support import ALLREDUCE, blob_data, fit_config, train_stage


def planned(stages: dict[str, StageConfig], *, prints: dict[str, str] | None = None) -> list[Planned]:
    nodes = build(stages)
    job = Job(JobConfig(run=RunConfig()), stages, {})
    prepared = Prepared(job, nodes, blob_data(), None, NullTracker(), {})  # type: ignore[arg-type]
    found = prints or {node.name: node.name for node in nodes}
    return [
        Planned(
            node,
            "run",
            "no artifact yet",
            found[node.name],
            whole=whole_because(node, prepared),
            keys=keys_of(node, found),
        )
        for node in nodes
    ]


def side_by_side(stages: dict[str, StageConfig], *, ranks: int = 4, at_once: int = 4, **given: Any) -> list[set[str]]:
    """The names of each turn's stages."""
    steps = in_turns(planned(stages, **given), ranks=ranks, at_once=at_once)
    return [{step.node.name for step in steps if step.turn == turn} for turn in range(steps[-1].turn + 1)]


def distill(**changes: Any) -> DistillStage:
    base = {key: getattr(train_stage(), key) for key in ("seed", "model", "optimizer", "schedule", "strategy", "fit")}
    return DistillStage(**{**base, "needs": {"teacher": "a"}, "distiller": {"cache": False}, **changes})


def test_training_and_quantizing_share_the_ranks_and_measuring_does_not() -> None:
    stages: dict[str, StageConfig] = {
        "a": train_stage(),
        "b": train_stage(seed=1),
        "eval_a": EvaluateStage(seed=0, needs={"model": "a"}),
        "int8_a": QuantizeStage(seed=0, needs={"model": "a"}),
        "int8_b": QuantizeStage(seed=0, needs={"model": "b"}),
        "report": ReportStage(seed=0, needs={"a": "eval_a"}),
    }
    assert side_by_side(stages) == [{"a", "b"}, {"eval_a"}, {"int8_a", "int8_b"}, {"report"}]
    assert [len(turn) for turn in side_by_side(stages, at_once=1)] == [1] * 6
    assert [len(turn) for turn in side_by_side(stages, ranks=1)] == [1] * 6


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": FitConfig(sync_batchnorm=False)},
        {"fit": FitConfig(accumulate=2)},
        {"strategy": {**ALLREDUCE, "compression": "topk"}},
        {"strategy": {**ALLREDUCE, "hierarchical": True}},
        {"strategy": {"_target_": "horovod_jobs.strategy.local_sgd.LocalSgd"}},
    ],
)
def test_what_depends_on_the_number_of_ranks_has_them_all(changes: dict[str, Any]) -> None:
    assert side_by_side({"a": train_stage(**changes), "b": train_stage(seed=1, **changes)}) == [{"a"}, {"b"}]


def test_students_that_keep_their_teachers_outputs_do_not_make_them_twice_at_once() -> None:
    cached = {"distiller": {"cache": True}}
    teacher = {"a": train_stage()}
    assert side_by_side({**teacher, "s": distill(**cached), "t": distill(seed=1, **cached)}) == [{"a"}, {"s"}, {"t"}]
    assert side_by_side({**teacher, "s": distill(), "t": distill(seed=1)}) == [{"a"}, {"s", "t"}]


def test_twins_are_not_made_twice_at_once() -> None:
    stages: dict[str, StageConfig] = {"a": train_stage(), "b": train_stage()}
    assert side_by_side(stages, prints={"a": "same", "b": "same"}) == [{"a"}, {"b"}]


def test_the_plan_says_who_runs_where() -> None:
    steps = in_turns(planned({"a": train_stage(), "b": train_stage(seed=1)}), ranks=3, at_once=2)
    assert [step.why for step in steps] == [
        "no artifact yet; on ranks 0 and 1 of 3, beside b",
        "no artifact yet; on rank 2 of 3, beside a",
    ]


def test_a_part_has_the_global_batch_of_the_whole() -> None:
    step = planned({"a": train_stage(fit=fit_config(batch_per_rank=6))})[0]
    fit = _for_part(step, ranks=4).node.config.fit  # type: ignore[attr-defined]
    assert (fit.batch_per_rank, fit.global_batch) == (None, 24)
    plain = planned({"a": train_stage()})[0]
    assert _for_part(plain, ranks=4) is plain


A, B = (replace(step, why="") for step in planned({"a": train_stage(), "b": train_stage(seed=1)}))


def ends(first: Exception | None, second: Exception | None) -> list[Any]:
    """The outcomes of two stages on two ranks each, whose ranks agree."""
    told = [
        [_description(error), {"status": "ran" if error is None else "running"}]
        for error in (first, first, second, second)
    ]
    return [_outcome(step, ranks, told) for step, ranks in zip((A, B), shares(4, 2), strict=True)]


def test_the_failure_is_told_and_not_the_stop_that_it_caused() -> None:
    outcomes = ends(Interrupted("stopped by a signal in stage a"), NonFiniteError("the loss is not finite in stage b"))
    assert [outcome.entry["status"] for outcome in outcomes] == ["pending", "failed"]
    for own in (Interrupted("stopped by a signal in stage a"), NonFiniteError("the loss is not finite in stage b")):
        with pytest.raises(NonFiniteError, match=r"not finite in stage b \(stage b ran on ranks 2 and 3 of 4\)"):
            _raise(outcomes, own, size=4)


def test_stops_are_told_together_and_ctrl_c_wins() -> None:
    with pytest.raises(Interrupted, match="in a; .*in b"):
        _raise(ends(Interrupted("in a"), Interrupted("in b")), None, size=4)
    with pytest.raises(InterruptedByUser):
        _raise(ends(Interrupted("in a"), InterruptedByUser("in b")), None, size=4)
    outcomes = ends(None, Interrupted("in b"))
    assert [outcome.entry["status"] for outcome in outcomes] == ["ran", "pending"], "what is published stays"
    with pytest.raises(Interrupted, match="^in b$"):
        _raise(outcomes, None, size=4)


def test_a_bug_is_raised_where_it_is_and_told_elsewhere() -> None:
    bug = ZeroDivisionError("division by zero")
    outcomes = ends(None, bug)
    with pytest.raises(ZeroDivisionError):
        _raise(outcomes, bug, size=4)
    with pytest.raises(WorldError, match="stage b ran on ranks 2 and 3 of 4 and failed: .*division by zero"):
        _raise(outcomes, None, size=4)


def test_a_world_of_one_is_not_split() -> None:
    pytest.importorskip("horovod")
    from horovod_jobs.comm.groups import Split

    with pytest.raises(AssertionError):
        Split(SingleWorld(), [range(1)])


def test_hosts_are_told_apart_where_a_name_does_not() -> None:
    pytest.importorskip("horovod")
    from horovod_jobs.comm.groups import hosts_of

    assert hosts_of([("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2)]) == [0, 0, 1, 1]
    assert hosts_of([("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("b", 1, 2)]) == [0, 1, 0, 1]
    assert hosts_of([("a", 0, 1), ("a", 0, 1)]) == [0, 1], "one machine that is counted as two hosts"
    assert hosts_of([("a", 0, 2), ("a", 1, 2), ("a", 0, 1)]) == [0, 0, 1]
