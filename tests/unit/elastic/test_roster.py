"""Who is in a world and what is done when: pure decisions, told by hand and by random schedules of joins, losses and waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_jobs.launch.elastic.entries import State
from tests.unit.elastic.simulated import RULES, Job


def test_the_first_world_waits_for_all_its_ranks() -> None:
    job = Job(a=2, b=1)
    assert [member for member, _ in job.tick().spawn] == ["member-1", "member-2", "member-3"]
    job.join("member-1")
    assert not job.tick(30).formed
    job.join("member-3")
    job.join("member-2")
    assert job.tick().formed
    assert [(entry.slot.host, entry.slot.index) for entry in job.roster.places()] == [("a", 0), ("a", 1), ("b", 0)]


def test_it_begins_with_fewer_when_the_time_is_over() -> None:
    job = Job(a=2)
    job.tick()
    job.join("member-2")
    actions = job.tick(61)
    assert [member for member, _ in actions.kill] == ["member-1"]
    job.tick()
    assert job.formed == [["member-2"]]


def test_survivors_go_on_at_once_and_the_slot_is_filled_after_its_cooldown() -> None:
    job = Job(a=2)
    job.all_join()
    job.kill("member-1")
    assert job.roster.losses == 1
    assert not job.tick().formed, "the other one is still in the old world"
    assert job.report("member-2", "lost")
    job.join("member-2")
    assert job.tick().formed
    assert job.formed[-1] == ["member-2"]
    assert not job.tick(4).spawn
    assert [slot.index for _, slot in job.tick(1).spawn] == [0]
    assert not job.roster.orders("member-2", now=job.now), "not before the new one is there"
    job.join("member-3")
    assert job.roster.orders("member-2", now=job.now) == 1
    assert job.report("member-2", "stopped")
    job.join("member-2")
    assert job.tick().formed
    assert job.formed[-1] == ["member-2", "member-3"], "the one that has the commits is rank 0"
    assert job.roster.losses == 1, "growing is no loss"


def test_survivors_can_wait_for_a_replacement() -> None:
    job = Job(replace(RULES, wait_s=20, cooldown_s=0), a=2)
    job.all_join()
    job.kill("member-1")
    job.report("member-2", "lost")
    job.join("member-2")
    assert not job.tick().formed
    job.join("member-3")
    assert job.tick().formed
    assert job.formed[-1] == ["member-2", "member-3"]
    job.kill("member-3")
    job.join("member-2")
    job.tick()
    assert job.tick(21).formed, "not for ever"
    assert job.formed[-1] == ["member-2"]


def test_cooldowns_double_with_each_loss_of_a_slot() -> None:
    job = Job(replace(RULES, start_s=1000), a=1)
    pauses = []
    for _ in range(7):
        job.all_join()
        (entry,) = job.roster.places()
        job.kill(entry.member)
        pauses.append(next(count for count in range(1, 200) if job.tick(0.5).spawn) // 2)
    assert pauses == [5, 10, 20, 40, 80, 80, 80]


def test_a_host_that_is_taken_away_is_left_with_a_checkpoint() -> None:
    job = Job(a=1, b=1)
    job.all_join()
    job.roster.discovered({"b": 1})
    assert [job.roster.orders(member, now=job.now) for member in job.formed[-1]] == [1, 1]
    job.all_join()
    assert job.formed[-1] == ["member-2"]
    assert job.roster.losses == 0
    assert set(job.roster.entries) == {"member-2"}


def test_who_sees_the_others_leave_as_planned_has_lost_nobody() -> None:
    job = Job(a=1, b=1)
    job.all_join()
    job.roster.discovered({"b": 1})
    assert job.report("member-1", "stopped")
    assert job.report("member-2", "lost")
    assert job.roster.losses == 0
    job.kill("member-1")
    assert job.roster.broken


def test_the_last_rank_is_not_sent_away_before_another_is_there() -> None:
    job = Job(replace(RULES, max_np=1), a=1)
    job.all_join()
    job.roster.discovered({"b": 1})
    assert not job.roster.orders("member-1", now=job.now)
    job.tick()
    job.join("member-2")
    assert job.roster.orders("member-1", now=job.now) == 1
    job.all_join()
    assert job.formed[-1] == ["member-2"]


def test_the_limit_of_losses_ends_the_job_and_says_why() -> None:
    job = Job(replace(RULES, reset_limit=1, cooldown_s=0), a=2)
    for _ in range(2):
        job.all_join()
        job.kill(job.formed[-1][1])
    code, text = job.tick().end or (0, "")
    assert code == 9
    assert "lost 2 times, more than launch.elastic.reset_limit=1" in text
    assert "rank 1 on a was ended by signal 9" in text
    assert "the same command goes on" in text


def test_the_rank_that_died_is_named_and_not_the_one_that_noticed() -> None:
    job = Job(replace(RULES, reset_limit=0), a=2)
    job.all_join()
    job.report("member-1", "lost")
    assert job.tick().end is None, "a moment later it is known who died"
    job.kill("member-2")
    _, text = job.tick().end or (0, "")
    assert "(the last: rank 1 on a was ended by signal 9)" in text


def test_a_loss_without_a_death_counts_too() -> None:
    job = Job(replace(RULES, reset_limit=0), a=2)
    job.all_join()
    job.report("member-1", "lost")
    assert not job.tick(0.5).spawn
    code, text = job.tick(0.6).end or (0, "")
    assert (code, "rank 0 on a: it was" in text) == (9, True)


def test_a_rank_that_dies_at_its_start_counts_every_time() -> None:
    job = Job(replace(RULES, reset_limit=3, cooldown_s=0), a=1)
    for count in range(1, 5):
        job.tick()
        (member,) = job.roster.entries
        job.roster.ended(member, code=1, now=job.now)
        assert job.roster.losses == count
    assert (job.tick().end or (0, ""))[0] == 9


def test_a_host_that_cannot_be_reached_does_not_disturb_those_who_work() -> None:
    job = Job(replace(RULES, reset_limit=1, min_np=1), a=1)
    job.all_join()
    job.roster.discovered({"a": 1, "b": 1})
    tried = 0
    for _ in range(2000):
        for member, slot in job.tick(1.0).spawn:
            assert slot.host == "b"
            tried += 1
            job.roster.ended(member, code=255, now=job.now)
    assert 5 < tried < 40, "again and again, ever less often"
    assert (job.roster.losses, job.formed) == (0, [["member-1"]])


def test_a_late_end_of_an_old_world_s_rank_does_not_break_the_new_one() -> None:
    job = Job(a=2)
    job.all_join()
    job.report("member-2", "failed", code=1)
    job.join("member-1")
    assert job.tick().formed
    job.roster.ended("member-2", code=1, now=job.now)
    assert job.roster._broken_at is None
    assert job.roster.losses == 1


def test_too_few_ranks_end_the_job_after_a_time() -> None:
    job = Job(replace(RULES, min_np=2), a=2)
    job.all_join()
    job.roster.discovered({"a": 1})
    job.kill("member-2")
    job.join("member-1")
    assert job.tick(59).end is None
    code, text = job.tick(2).end or (0, "")
    assert (code, "1 of at least launch.elastic.min_np=2" in text) == (9, True)


@pytest.mark.parametrize(
    ("code", "final"), [(2, True), (3, True), (6, True), (7, True), (8, True), (1, False), (9, False)]
)
def test_an_error_that_would_come_again_ends_the_job(code: int, final: bool) -> None:
    job = Job(a=2)
    job.all_join()
    assert not job.report("member-2", "failed", code=code)
    end = job.tick().end
    assert (end is not None and end[0] == code) is final
    assert job.roster.losses == (0 if final else 1)


def test_a_job_that_cannot_start_ends_and_a_host_that_cannot_start_it_later_does_not_end_it() -> None:
    job = Job(a=1)
    job.tick()
    job.roster.ended("member-1", code=5, now=job.now)
    assert job.tick().end == (5, "")
    job = Job(a=1)
    job.all_join()
    job.roster.discovered({"a": 1, "b": 1})
    job.tick()
    job.roster.ended("member-2", code=5, now=job.now)
    assert job.tick().end is None


def test_the_job_is_done_when_rank_0_is() -> None:
    job = Job(a=2)
    job.all_join()
    job.report("member-2", "done", code=0)
    assert job.tick().end is None
    job.report("member-1", "done", code=0)
    assert job.tick().end == (0, "")


def test_rank_0_lost_at_the_very_end_is_done_again() -> None:
    job = Job(replace(RULES, cooldown_s=0), a=2)
    job.all_join()
    job.report("member-2", "done", code=0)
    job.roster.ended("member-2", code=0, now=job.now)
    job.kill("member-1")
    job.all_join()
    assert len(job.formed) == 2
    assert len(job.formed[-1]) == 2


@pytest.mark.parametrize(("asked", "code"), [(1, 75), (2, 130)])
def test_a_stop_waits_for_those_who_work(asked: int, code: int) -> None:
    job = Job(a=2)
    job.all_join()
    job.roster.stop = asked
    assert job.tick().end is None
    assert [job.roster.orders(member, now=job.now) for member in job.formed[-1]] == [asked, asked]
    for member in job.formed[-1]:
        assert not job.report(member, "stopped", code=code)
    assert job.tick().end == (code, "")


def test_a_rank_with_a_signal_of_its_own_leaves_and_all_with_one_stop() -> None:
    job = Job(a=2)
    job.all_join()
    assert not job.report("member-2", "stopped", signalled=True)
    assert job.report("member-1", "stopped")
    job.roster.ended("member-2", code=75, now=job.now)
    job.join("member-1")
    job.tick()
    assert job.formed[-1] == ["member-1"]
    assert job.roster.losses == 0
    assert not job.report("member-1", "stopped", signalled=True)
    assert job.tick().end == (75, "")


def test_silence_is_the_end_of_a_rank_within_the_lease() -> None:
    job = Job(a=2)
    job.all_join()
    silent = job.roster.entries["member-2"]
    seconds = 0
    while not (killed := job.roster.tick(job.now).kill):
        job.now, seconds = job.now + 1.0, seconds + 1
        job.roster.entries["member-1"].heard = job.now
        assert seconds < 20
    assert [member for member, _ in killed] == [silent.member]
    assert seconds == 12, "a second after its lease: until then it may still be alive"


def test_a_driver_that_was_stopped_does_not_take_its_ranks_for_silent() -> None:
    job = Job(a=2)
    job.all_join()
    assert job.roster.tick(job.now + 100).kill == []
    assert job.roster.losses == 0


def test_a_rank_that_does_not_come_back_after_a_loss_is_killed() -> None:
    job = Job(a=3)
    job.all_join()
    job.kill("member-1")
    job.join("member-2")
    assert job.tick(29).kill == []
    assert [member for member, _ in job.tick(2).kill] == ["member-3"]
    job.tick()
    assert job.formed[-1] == ["member-2"]


def test_a_rank_that_begins_anew_is_waited_for_and_keeps_its_place_in_the_queue() -> None:
    job = Job(a=2)
    job.all_join()
    job.kill("member-2")
    assert job.report("member-1", "restart")
    assert job.roster.entries["member-1"].state is State.STARTING
    job.tick(6)
    job.join("member-3")
    job.join("member-1")
    job.tick()
    assert job.formed[-1][0] == "member-1"


HOSTS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 2), min_size=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 9)),
        st.tuples(st.just("kill"), st.integers(0, 9)),
        st.tuples(st.just("lost"), st.integers(0, 9)),
        st.tuples(st.just("signalled"), st.integers(0, 9)),
        st.tuples(st.just("restart"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 3.0, 12.0])),
        st.tuples(st.just("hosts"), HOSTS),
        st.tuples(st.just("all"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(hosts=HOSTS, steps=STEPS, min_np=st.integers(1, 2), wait_s=st.sampled_from([0.0, 5.0]))
def test_any_schedule_gives_sound_worlds_and_ends_in_the_largest(
    hosts: dict[str, int], steps: list[tuple[str, object]], min_np: int, wait_s: float
) -> None:
    """``check_world`` looks at every world that forms; after the last fault the job grows to what the hosts allow."""
    rules = replace(RULES, min_np=min_np, wait_s=wait_s, start_s=1e6, reset_limit=1000)
    job = Job(rules, **hosts)
    for what, value in steps:
        members = sorted(job.roster.entries)
        chosen = members[value % len(members)] if isinstance(value, int) and members else None
        entry = job.roster.entries[chosen] if chosen is not None else None
        if what == "hosts":
            job.roster.discovered(value)  # type: ignore[arg-type]
        elif what == "all":
            job.all_join()
        elif what == "wait":
            job.tick(float(value))  # type: ignore[arg-type]
        elif entry is None or chosen is None:
            continue
        elif what == "join":
            job.join(chosen)
        elif what == "kill":
            job.kill(chosen)
        elif entry.state is State.WORKING and what in ("lost", "restart"):
            job.report(chosen, what)
        elif entry.state is State.WORKING and what == "signalled" and len(job.roster.places()) > 1:
            job.report(chosen, "stopped", signalled=True)
            job.roster.ended(chosen, code=75, now=job.now)
            for other in job.roster.places():  # A stop is agreed by all ranks of a world.
                job.report(other.member, "stopped")
                job.roster.ready(other.member, now=job.now)
        job.tick()
        assert job.roster._end is None
    wanted = min(rules.max_np, sum(job.roster.target.values()))
    if wanted < min_np:
        return
    for _ in range(12):  # Cooldowns pass, and those who gather.
        job.tick(100)
        job.all_join()
    assert len(job.roster.places()) == wanted
    # A host that went and came back while its rank was starting leaves one more than there is room for: a spare.
    assert {entry.state for entry in job.roster.entries.values()} <= {State.WORKING, State.READY}
