"""The driver with real processes that are members and know no Horovod: they notice that another one is gone by its process id."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs import early
from horovod_jobs.errors import SetupError, WorldError
from horovod_jobs.launch.elastic.discovery import Fixed
from horovod_jobs.launch.elastic.driver import Driver, Journal
from horovod_jobs.launch.elastic.entries import Rules
from horovod_jobs.launch.elastic.spawn import LocalSpawner

RULES = Rules(min_np=1, max_np=3, start_s=20, wait_s=0, lease_s=2, return_s=10, cooldown_s=0, reset_limit=3)
# A member: works until it is asked to stop, until another one of its world is gone, or until there is a file ``done``.
FAKE = """
import os, sys, threading, time
from pathlib import Path
from horovod_jobs.comm.member import take_ticket
here, member, asked = Path(sys.argv[1]), take_ticket(), threading.Event()
member.start(asked=lambda code: asked.set())

def alive(path):
    try:
        return "Z" not in Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return path.exists() and not path.read_text()

while (place := member.join()) is not None:
    asked.clear()
    (here / f"{place.generation}-{place.rank}").write_text(str(os.getpid()))
    peers = [here / f"{place.generation}-{rank}" for rank in range(place.size)]
    while not all(path.exists() for path in peers):
        time.sleep(0.005)
    while True:
        time.sleep(0.01)
        if (here / "done").exists():
            member.report("done", code=0)
            sys.exit(0)
        if (here / "bug").exists() and place.rank == 1:
            (here / "bug").unlink()
            member.report("failed", code=1, text="a bug")
            sys.exit(1)
        if (here / "refused").exists():
            member.report("failed", code=3, text="no data")
            sys.exit(3)
        if not all(map(alive, peers)) and not asked.wait(0.2):  # Real ranks agree on a stop: who sees it late has no loss.
            again = member.report("lost", code=9, text="a peer is gone")
            break
        if asked.is_set() and not (here / "deaf").exists():
            again = member.report("stopped", code=75)
            break
    if not again:
        sys.exit(75 if asked.is_set() else 9)
"""


class Scene:
    """A driver, and what is done to it from another thread once the world is as it should be."""

    def __init__(self, directory: Path, rules: Rules = RULES, *, grace_s: float = 5, **hosts: int) -> None:
        self.directory, self.hosts = directory, hosts
        self.journal = directory / "run" / "elastic.jsonl"
        self.journal.parent.mkdir()
        self.driver = Driver(
            rules,
            discovery=self,
            spawner=LocalSpawner([sys.executable, "-c", FAKE, str(directory)], dict(os.environ)),
            journal=Journal(self.journal),
            address="127.0.0.1",
            interface="lo",
            beat_s=0.05,
            gloo_timeout_s=5,
            discovery_every_s=0.05,
            grace_s=grace_s,
        )
        self.failed: BaseException | None = None

    def find(self) -> dict[str, int]:
        return Fixed(self.hosts).find()

    def told(self, event: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def until(self, what: str, look: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 15
        while not (found := look()):
            assert time.monotonic() < deadline, f"{what}\n{self.journal.read_text()}"
            time.sleep(0.01)
        return found

    def world(self, number: int, *, size: int) -> list[int]:
        """Wait until that world works; its process ids by rank."""
        self.until(f"world {number}", lambda: len(self.told("world")) > number)
        worlds = self.told("world")
        assert worlds[number]["size"] == size
        pids = [rank["pid"] for rank in worlds[number]["ranks"]]
        self.until(
            "its ranks",
            lambda: all((self.directory / f"{worlds[number]['generation']}-{rank}").exists() for rank in range(size)),
        )
        return pids

    def done(self) -> None:
        (self.directory / "done").touch()

    def play(self, scene: Callable[[], None]) -> int:
        """Run the driver here and the scene beside it; the driver's code."""

        def beside() -> None:
            try:
                scene()
            except BaseException as error:
                self.failed = error
                self.done()

        thread = threading.Thread(target=beside)
        thread.start()
        try:
            code = self.driver.run()
        finally:
            thread.join(timeout=20)
            if self.failed is not None:
                raise self.failed
        assert self.driver.processes == {} or all(
            process.poll() is not None for process in self.driver.processes.values()
        )
        return code


def test_killed_grown_and_shrunk(tmp_path: Path) -> None:
    scene = Scene(tmp_path, replace(RULES, cooldown_s=1), a=2)

    def play() -> None:
        first = scene.world(0, size=2)
        os.kill(first[0], signal.SIGKILL)
        assert scene.world(1, size=1) == [first[1]], "at once, without the killed one"
        second = scene.world(2, size=2)
        assert second[0] == first[1]
        scene.hosts = {"a": 2, "b": 1}
        assert len(set(scene.world(3, size=3)) & set(second)) == 2
        scene.hosts = {"b": 1}
        scene.world(4, size=1)
        scene.done()

    assert scene.play(play) == 0
    (end,) = scene.told("end")
    assert (end["losses"], end["generations"]) == (1, 5)


def test_a_stopped_rank_is_noticed_within_its_lease(tmp_path: Path) -> None:
    scene = Scene(tmp_path, replace(RULES, wait_s=15, lease_s=1), a=2)
    seconds: list[float] = []

    def play() -> None:
        first = scene.world(0, size=2)
        os.kill(first[1], signal.SIGSTOP)
        stopped = time.monotonic()
        second = scene.world(1, size=2)
        seconds.append(time.monotonic() - stopped)
        assert first[1] not in second
        scene.done()

    assert scene.play(play) == 0
    assert 1.5 < seconds[0] < 4
    assert "was silent for 2" in scene.told("kill")[0]["why"]


def test_one_rank_s_bug_is_a_loss_and_an_error_of_all_is_the_end(tmp_path: Path) -> None:
    scene = Scene(tmp_path, replace(RULES, wait_s=15), a=2)

    def play() -> None:
        scene.world(0, size=2)
        (tmp_path / "bug").touch()
        scene.world(1, size=2)
        (tmp_path / "refused").touch()

    assert scene.play(play) == 3
    assert scene.told("end")[0]["losses"] == 1


def test_the_reset_limit(tmp_path: Path) -> None:
    scene = Scene(tmp_path, replace(RULES, wait_s=15, reset_limit=1), a=2)

    def play() -> None:
        for number in range(2):
            os.kill(scene.world(number, size=2)[1], signal.SIGKILL)

    with pytest.raises(WorldError, match="ranks were lost 2 times, more than launch.elastic.reset_limit=1"):
        scene.play(play)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_is_asked_of_all(tmp_path: Path, number: signal.Signals, code: int) -> None:
    scene = Scene(tmp_path, a=2)

    def play() -> None:
        scene.world(0, size=2)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert scene.play(play) == code
    assert signal.getsignal(number) is before
    assert [entry["outcome"] for entry in scene.told("report")] == ["stopped", "stopped"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_before_there_is_a_world_is_told_by_the_driver(
    tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, before = Scene(tmp_path, a=0), signal.getsignal(number)

    def play() -> None:
        deadline = time.monotonic() + 15
        while signal.getsignal(number) is before and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    assert scene.play(play) == code
    assert f"error: {early.said(number)}\n" in capsys.readouterr().err


def test_who_does_not_stop_in_time_or_is_told_twice_is_killed(tmp_path: Path) -> None:
    for number, (grace_s, signals) in enumerate(((0.5, 1), (60, 2))):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "deaf").touch()
        scene = Scene(directory, grace_s=grace_s, a=1)

        def play(scene: Scene = scene, signals: int = signals) -> None:
            scene.world(0, size=1)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

        started = time.monotonic()
        assert scene.play(play) == 143
        assert time.monotonic() - started < 15


def test_hosts_that_are_not_known_at_the_start(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.find = lambda: (_ for _ in ()).throw(SetupError("no cluster"))  # type: ignore[method-assign]
    with pytest.raises(SetupError, match="no cluster"):
        scene.play(lambda: None)


def test_a_flood_of_refusals_is_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scene = Scene(tmp_path, a=1)

    def play() -> None:
        scene.world(0, size=1)
        for _ in range(150):
            scene.driver._refused("10.0.0.9", "PUT refused: it is not signed")
        scene.done()

    assert scene.play(play) == 0
    assert len(scene.told("refused")) == 101
    assert scene.told("end")[0]["refusals"] == 150
    assert capfd.readouterr().err.count("a request from 10.0.0.9 was refused: it is not signed") == 100
