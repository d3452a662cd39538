"""The watchdog: what counts as waiting, who is silent, and when a job is ended."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from horovod_jobs.comm.channel import sleep_until, wait_until
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.console import Console
from horovod_jobs.errors import WorldError
from horovod_jobs.pulse import Others, Pulse, SignsOfLife, Wait, read_sign, waiting_in

INTERVAL_S = 0.02


class Stuck(SingleWorld):
    """One rank of two; the other never comes to a collective."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 2
        self.release = threading.Event()


# ``waiting_in`` goes by the module that a function was defined in: as comm's own are.
exec(
    compile("def barrier(world, *, name):\n    world.release.wait()\n", "comm.py", "exec"),
    scope := {"__name__": "horovod_jobs.comm.fake"},
)
barrier = scope["barrier"]


def waiting(world: Stuck, body: Any) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def settle(condition: Any, *, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


def test_a_thread_waits_where_comm_is_on_top_of_its_stack() -> None:
    # threading.Event.wait is Python code on top of comm's frame, which is what makes this rank count as at work;
    # a lock's acquire is not Python, as Horovod's and MPI's own waits are not.
    world = Stuck()
    lock = threading.Lock()
    lock.acquire()
    world.release = SimpleNamespace(wait=lock.acquire)  # type: ignore[assignment]
    thread = waiting(world, lambda: barrier(world, name="fit.control"))
    settle(lambda: (waiting_in(thread.ident or 0) or ("",))[0] == "fit.control")
    lock.release()
    thread.join()
    assert waiting_in(thread.ident or 0) is None


def test_who_is_in_a_loop_that_waits_does_so_whatever_it_asks_between_two_looks() -> None:
    asked, over = threading.Event(), threading.Event()

    def done() -> bool:  # Not comm's own code: it looks for ranks that have died, say.
        asked.set()
        over.wait()
        return True

    condition = threading.Condition()

    def sleep() -> None:
        with condition:
            sleep_until(done, condition, name="parameters", look_s=0.05)

    for body, name in ((lambda: wait_until(done, name="flags"), "flags"), (sleep, "parameters")):
        asked.clear()
        over.clear()
        thread = threading.Thread(target=body)
        thread.start()
        assert asked.wait(10)
        first = waiting_in(thread.ident or 0)
        assert first is not None
        assert first[0] == name
        assert waiting_in(thread.ident or 0) == first, "it is the same wait"
        over.set()
        thread.join()


def test_rank_0_at_work_inside_main_does_not_wait() -> None:
    seen: list[Any] = []
    SingleWorld().main(lambda: seen.append(waiting_in(threading.get_ident())), name="stage.publish")
    assert seen == [None]


def test_a_wait_begins_anew_where_the_work_has_gone_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Wait()
    monkeypatch.setattr("horovod_jobs.pulse.waiting_in", lambda thread: ("gradients", 1))
    for now, progress, seconds in ((1.0, 1, 0.0), (3.0, 1, 2.0), (5.0, 2, 0.0), (8.0, 2, 3.0)):
        wait.look(0, progress, now=now)
        assert wait.seconds == seconds
    monkeypatch.setattr("horovod_jobs.pulse.waiting_in", lambda thread: None)
    wait.look(0, 2, now=20.0)
    assert (wait.name, wait.seconds) == (None, 0.0)


def sign(directory: Path, rank: int, **values: Any) -> None:
    told = {"rank": rank, "host": "a", "pid": 7, "beat": 1, "every_s": 2.0, "doing": None, "waiting_in": None, **values}
    (directory / f"rank-{rank}.json").write_text(json.dumps(told))


def test_who_is_silent_is_counted_on_this_ranks_clock(tmp_path: Path) -> None:
    others = Others(Stuck(), tmp_path)
    sign(tmp_path, 1)
    others.look(100.0)
    assert others.silent(100.0, limit_s=10) == []
    sign(tmp_path, 1, beat=2)
    others.look(109.0)
    others.look(115.0)
    assert others.silent(115.0, limit_s=10) == []
    assert others.silent(120.0, limit_s=10) == [1]
    assert others.silent(120.0, limit_s=None) == []
    (tmp_path / "rank-1.json").write_text("{")  # Damaged or half read: no new sign.
    others.look(121.0)
    assert others.silent(121.0, limit_s=10) == []  # It has changed: its beat is unknown now.
    assert read_sign(tmp_path / "rank-1.json") is None
    assert others.describe(1) == "rank 1 (host a, pid 7)"
    assert others.describe(3) == "rank 3 (never seen)"


def test_a_server_counts_where_it_has_ever_been_seen(tmp_path: Path) -> None:
    others = Others(Stuck(), tmp_path, servers=(2, 3))
    sign(tmp_path, 1)
    sign(tmp_path, 2)
    others.look(100.0)
    sign(tmp_path, 1, beat=2)
    others.look(120.0)
    assert others.silent(120.0, limit_s=10) == [2], "server 3 does not see the run's directory"
    assert others.ranks == [1, 2, 3]


def test_a_server_gives_signs_of_life_in_one_run_after_another(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        (run / "logs").mkdir(parents=True)
    with SignsOfLife(3) as signs:
        signs.begin(str(runs[0]))
        first = read_sign(runs[0] / "ranks" / "rank-3.json")
        assert first is not None
        assert (first["doing"], first["ended"]) == ("serving parameters", False)
        signs.begin(str(runs[1]))
        assert (read_sign(runs[0] / "ranks" / "rank-3.json") or {})["ended"]
        signs.begin(str(tmp_path / "not here"))
        assert not (tmp_path / "not here").exists()
    assert (read_sign(runs[1] / "ranks" / "rank-3.json") or {})["ended"]


def test_rank_0_tells_who_is_silent_to_who_sees_its_lines_only(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "logs").mkdir()
    one = Pulse(Stuck(), run_dir=tmp_path, console=Console(is_main=False, mode="none"), interval_s=INTERVAL_S, silent_limit_s=None,
                stall_limit_s=None, end=lambda error, silent: None, tell=told.append)  # fmt: skip
    one.start()
    settle(lambda: len(told) >= 3)
    one.stop()
    assert told[0] == {"event": "ranks", "size": 2, "silent": []}, "rank 1 has its time"
    assert told[-1]["silent"] == [1]


def pulse(world: World, run_dir: Path, ended: list[Any], **limits: float | None) -> Pulse:
    (run_dir / "logs").mkdir(exist_ok=True)
    return Pulse(world, run_dir=run_dir, console=Console(is_main=False, mode="none"), interval_s=INTERVAL_S,
                 end=lambda error, silent: ended.append((error, silent)), **limits)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "missing", "message"),
    [
        (
            {"silent_limit_s": 0.3, "stall_limit_s": None},
            [1],
            r"rank 0 has waited in 'fit.control' for .* rank 1 \(host a, pid 7\) gave no sign of life for 0.3 s",
        ),
        (
            {"silent_limit_s": None, "stall_limit_s": 0.3},
            [1],
            r"waited in 'fit.control' .*run.stall_limit_s=0.3.* rank 1 .*a, pid 7\) at work",
        ),
    ],
)
def test_a_wait_without_end_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float | None], missing: list[int], message: str
) -> None:
    monkeypatch.setattr("horovod_jobs.pulse.waiting_in", lambda thread: ("fit.control", 1))
    (tmp_path / "ranks").mkdir()
    sign(tmp_path / "ranks", 1, doing="model")
    ended: list[tuple[WorldError, list[int]]] = []
    running = pulse(Stuck(), tmp_path, ended, **limits)
    running.start()
    settle(lambda: bool(ended))
    running.stop()
    with pytest.raises(WorldError, match=message):
        raise ended[0][0]
    assert ended[0][1] == missing, "who cannot tell it"
    stacks = (tmp_path / "logs" / "stacks-0.txt").read_text()
    assert "test_a_wait_without_end_ends_the_job" in stacks
    assert (tmp_path / "ranks" / "alarm").exists()
    told = read_sign(tmp_path / "ranks" / "rank-0.json")
    assert told is not None
    assert told["ended"]
    assert told["waiting_in"] == "fit.control"


def test_a_rank_that_has_ended_in_the_middle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horovod_jobs.pulse.waiting_in", lambda thread: ("settled", 1))
    (tmp_path / "ranks").mkdir()
    sign(tmp_path / "ranks", 1, ended=True)
    for limit_s, found in ((None, 0), (0.2, 1)):
        ended: list[tuple[WorldError, list[int]]] = []
        running = pulse(Stuck(), tmp_path, ended, silent_limit_s=None, stall_limit_s=None, ended_limit_s=limit_s)
        running.start()
        settle(lambda running=running, ended=ended: bool(ended) or running._wait.seconds > 0.6)  # type: ignore[misc]
        running.stop()
        assert len(ended[:1]) == found
    assert re.search(r"rank 1 \(host a, pid 7\) has ended with an error of its own", str(ended[0][0]))


def test_a_rank_that_comes_late_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))
    # The same wait for 15 looks of 20 ms, then the next one: longer than a quarter of the limit, shorter than the limit.
    monkeypatch.setattr("horovod_jobs.pulse.waiting_in", lambda thread: ("gradients", next(calls) // 15))
    (tmp_path / "ranks").mkdir()
    sign(tmp_path / "ranks", 1)
    ended: list[Any] = []
    running = pulse(Stuck(), tmp_path, ended, silent_limit_s=3.0, stall_limit_s=3.0)
    running.start()
    settle(lambda: next(calls) > 60)
    running.stop()
    assert ended == []


def test_stacks_are_written_once_for_an_alarm_of_another_rank(tmp_path: Path) -> None:
    ended: list[Any] = []
    running = pulse(Stuck(), tmp_path, ended, silent_limit_s=None, stall_limit_s=None)
    running.start()
    (tmp_path / "ranks" / "alarm").write_text("rank 1 after 5 beats")
    stacks = tmp_path / "logs" / "stacks-0.txt"
    settle(stacks.exists)
    beat = (read_sign(tmp_path / "ranks" / "rank-0.json") or {})["beat"]
    settle(lambda: (read_sign(tmp_path / "ranks" / "rank-0.json") or {"beat": 0})["beat"] > beat + 3)
    running.stop()
    assert stacks.read_text().count("--- rank 0") == 1
