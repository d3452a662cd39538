"""What a hierarchical all-reduce goes together with."""

from __future__ import annotations

import pytest

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.allreduce import Allreduce


@pytest.mark.parametrize(
    "other", [{"compression": "fp16"}, {"compression": "topk"}, {"op": "adasum"}, {"predivide": 2.0}]
)
def test_nothing_else_combines_the_gradients_as_well(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="hierarchical"):
        Allreduce(hierarchical=True, **other)  # type: ignore[arg-type]


def test_it_is_exact_and_wants_the_whole_world() -> None:
    strategy = Allreduce(hierarchical=True)
    assert strategy.exact
    assert strategy.whole_world
    assert not Allreduce().whole_world
    assert "hierarchical" in Allreduce.TUNING, "the same artifact as the flat one's"


def test_horovod_is_started_for_process_sets_only_where_they_are_wanted() -> None:
    name = "HOROVOD_DYNAMIC_PROCESS_SETS"
    assert name not in Allreduce().environment()
    assert Allreduce(hierarchical=True).environment()[name] == "1"
    assert Allreduce(parallel_stages=2).environment()[name] == "1"


def test_cycles_stay_short_where_stages_run_side_by_side() -> None:
    """A rank that waits in one stage has the ranks of the other in its cycles, and those compute."""
    name = "HOROVOD_CYCLE_TIME"
    assert name not in Allreduce().environment()
    assert Allreduce(parallel_stages=2).environment()[name] == "1.0"
    assert Allreduce(parallel_stages=2, cycle_time_ms=3.0).environment()[name] == "3.0"
