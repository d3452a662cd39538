"""Signatures: nothing that was altered, made up or sent before is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_jobs.comm.signing import Guard, Numbers, Stamp, is_answer, new_key, sign_answer, sign_request

KEY = bytes(range(32))
WHOLE = {"method": "POST", "path": "/join", "body": b"{}"}


def expecting(*members: str) -> Guard:
    guard = Guard(KEY)
    for member in members:
        guard.expect(member)
    return guard


def test_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}


def test_a_request_is_taken_once() -> None:
    guard, stamp = expecting("member-1"), Stamp("member-1", 7)
    header = sign_request(KEY, stamp, **WHOLE)  # type: ignore[arg-type]
    assert guard.check(header, **WHOLE) == stamp  # type: ignore[arg-type]
    assert guard.check(header, **WHOLE) == "it was sent before"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"method": "GET"}, {"path": "/report"}, {"body": b"{ }"}, {"path": "/join", "body": b"{}", "method": "PUT"}],
    ids=str,
)
def test_what_was_altered_is_refused(change: dict[str, object]) -> None:
    header = sign_request(KEY, Stamp("member-1", 1), **WHOLE)  # type: ignore[arg-type]
    assert expecting("member-1").check(header, **{**WHOLE, **change}) == "its signature is wrong"  # type: ignore[arg-type]


def test_another_key_another_sender_or_number_is_refused() -> None:
    made = sign_request(KEY, Stamp("member-1", 1), **WHOLE)  # type: ignore[arg-type]
    foreign = sign_request(new_key(), Stamp("member-1", 1), **WHOLE)  # type: ignore[arg-type]
    for header in (foreign, made.replace("member-1", "member-2"), made.replace(":1:", ":2:")):
        assert expecting("member-1", "member-2").check(header, **WHOLE) == "its signature is wrong"  # type: ignore[arg-type]


def test_what_shows_at_a_glance_is_refused_without_the_body() -> None:
    guard, header = expecting("member-1"), sign_request(KEY, Stamp("member-1", 1), **WHOLE)  # type: ignore[arg-type]
    assert guard.glance(None) == "it is not signed"
    assert guard.glance("member-1:x:y") == "its signature cannot be read"
    assert guard.glance(header.replace("member-1", "member-2")) == "it is of nobody in this job"
    assert guard.glance(header) == (Stamp("member-1", 1), header.rpartition(":")[2])
    assert guard.glance(header) == guard.glance(header), "a glance uses nothing up"
    guard.check(header, **WHOLE)  # type: ignore[arg-type]
    assert guard.glance(header) == "it was sent before"


@given(st.one_of(st.none(), st.text(max_size=200)))
def test_any_other_header_is_refused_without_an_error(header: str | None) -> None:
    assert isinstance(Guard(KEY).check(header, **WHOLE), str)  # type: ignore[arg-type]


def test_the_fields_cannot_be_moved_into_each_other() -> None:
    one = sign_request(KEY, Stamp("m", 1), method="GET", path="/a", body=b"")
    other = sign_request(KEY, Stamp("m", 1), method="GE", path="T/a", body=b"")
    assert one != other


@given(st.permutations(range(1, 30)), st.integers(0, 40))
def test_requests_that_overtake_each_other_are_all_taken_and_none_twice(order: list[int], repeated: int) -> None:
    guard = expecting("m")
    for number in order:
        header = sign_request(KEY, Stamp("m", number), **WHOLE)  # type: ignore[arg-type]
        assert guard.check(header, **WHOLE) == Stamp("m", number)  # type: ignore[arg-type]
    again = sign_request(KEY, Stamp("m", order[repeated % len(order)]), **WHOLE)  # type: ignore[arg-type]
    assert guard.check(again, **WHOLE) == "it was sent before"  # type: ignore[arg-type]


def test_what_is_remembered_does_not_grow_and_what_is_forgotten_is_refused() -> None:
    guard = expecting("m")
    for number in range(1, 9000):
        assert guard._first_time(Stamp("m", number))
    floor, used = guard._used["m"]
    assert len(used) <= 4097
    assert floor > 4000
    assert not guard._first_time(Stamp("m", 5))


def test_an_answer_belongs_to_its_request() -> None:
    stamp = Stamp("member-1", 3)
    header = sign_answer(KEY, stamp, status=200, body=b"x")
    assert is_answer(KEY, stamp, header, status=200, body=b"x")
    assert not is_answer(KEY, Stamp("member-1", 4), header, status=200, body=b"x")
    assert not is_answer(KEY, stamp, header, status=404, body=b"x")
    assert not is_answer(KEY, stamp, header, status=200, body=b"y")
    assert not is_answer(new_key(), stamp, header, status=200, body=b"x")
    assert not is_answer(KEY, stamp, "", status=200, body=b"x")


def test_numbers_go_on_where_a_process_replaced_itself() -> None:
    numbers = Numbers(10)
    assert [numbers.take(), numbers.take()] == [11, 12]
    assert numbers.last == 12
