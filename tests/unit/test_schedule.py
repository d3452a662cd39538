"""Which stages run side by side, and on which ranks."""

from __future__ import annotations

import pytest

from horovod_jobs.schedule import Item, shares, shown, turns

TRIO = [Item("a"), Item("b"), Item("c")]


def test_one_at_a_time_is_the_graphs_order() -> None:
    items = [Item("a"), Item("eval_a", frozenset({"a"})), Item("b"), Item("eval_b", frozenset({"b"}))]
    assert turns(items, ranks=4, at_once=1) == [["a"], ["eval_a"], ["b"], ["eval_b"]]


@pytest.mark.parametrize(
    ("ranks", "at_once", "wanted"),
    [
        (1, 3, [["a"], ["b"], ["c"]]),
        (2, 3, [["a", "b"], ["c"]]),
        (2, 2, [["a", "b"], ["c"]]),
        (8, 2, [["a", "b"], ["c"]]),
        (3, 3, [["a", "b", "c"]]),
    ],
)
def test_at_most_so_many_and_one_a_rank(ranks: int, at_once: int, wanted: list[list[str]]) -> None:
    assert turns(TRIO, ranks=ranks, at_once=at_once) == wanted


def test_a_stage_waits_for_what_it_needs_and_not_for_more() -> None:
    items = [
        Item("a"),
        Item("student_a", frozenset({"a"})),
        Item("b", frozenset({"store/model-1"})),  # an artifact by its path: there from the start
        Item("student_b", frozenset({"b"})),
    ]
    assert turns(items, ranks=2, at_once=2) == [["a", "b"], ["student_a", "student_b"]]


def test_a_stage_that_wants_the_whole_world_has_it() -> None:
    items = [*TRIO[:2], Item("eval_a", frozenset({"a"}), alone=True), Item("eval_b", frozenset({"b"}), alone=True)]
    assert turns(items, ranks=4, at_once=4) == [["a", "b"], ["eval_a"], ["eval_b"]]
    items = [Item("first", alone=True), *TRIO]
    assert turns(items, ranks=4, at_once=2) == [["first"], ["a", "b"], ["c"]]


def test_two_stages_do_not_make_the_same_thing_side_by_side() -> None:
    twin, other = frozenset({"print 1"}), frozenset({"print 2"})
    items = [Item("a", keys=twin), Item("a again", keys=twin), Item("b", keys=other)]
    assert turns(items, ranks=3, at_once=3) == [["a", "b"], ["a again"]]


@pytest.mark.parametrize("ranks", range(1, 12))
def test_ranks_are_shared_out_evenly_and_completely(ranks: int) -> None:
    for parts in range(1, ranks + 1):
        cut = shares(ranks, parts)
        assert [rank for part in cut for rank in part] == list(range(ranks))
        lengths = [len(part) for part in cut]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)


def test_ranks_in_words() -> None:
    assert [shown(part) for part in shares(6, 3)] == ["ranks 0 and 1", "ranks 2 and 3", "ranks 4 and 5"]
    assert [shown(part) for part in shares(4, 2)] == ["ranks 0 and 1", "ranks 2 and 3"]
    assert [shown(part) for part in shares(4, 1)] == ["ranks 0 to 3"]
    assert shown(range(3, 4)) == "rank 3"
