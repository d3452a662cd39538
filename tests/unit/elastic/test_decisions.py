"""What the driver decides: each answer of a discovery script x each way in which a rank ends. No rank is a real process here."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs.comm.member import Ticket
from horovod_jobs.launch.elastic.discovery import Script
from horovod_jobs.launch.elastic.driver import Driver, Journal
from horovod_jobs.launch.elastic.entries import Rules, Slot

RULES = Rules(min_np=1, max_np=4, start_s=1000, wait_s=0, lease_s=1000, return_s=1000, cooldown_s=60, reset_limit=1)
KNOWN = {"a": 1, "b": 1}


@dataclass(frozen=True)
class Said:
    """A discovery script: what it does, which hosts are known after it, and the error that is told."""

    script: str
    hosts: dict[str, int]
    error: str = ""


@dataclass(frozen=True)
class Ended:
    """How rank 1 ends, in the slot of host b: what it reports before, if anything, and its exit code."""

    report: dict[str, Any] | None
    code: int
    ends: int | None = None  # the job's own code
    lost: bool = False
    rests: bool = False  # its slot gets nobody before the cooldown is over


SAID = {
    "same": Said("echo a:1; echo b:1", KNOWN),
    "fails": Said("echo no cluster >&2; exit 3", KNOWN, "failed with code 3 (no cluster)"),
    "hangs": Said("exec sleep 60", KNOWN, "did not answer within"),
    "rubbish": Said("echo '<html> 502'; echo a:1", KNOWN, "says '<html> 502'; print one host a line"),
    "no_text": Said(r"printf '\\377\\376\\n'", KNOWN, "print one host a line"),
    "twice": Said("echo a:1; echo a:1", KNOWN, "names a twice"),
    "loses_b": Said("echo a:1", {"a": 1}),
    "adds_c": Said("echo a:1; echo b:1; echo c:1", {**KNOWN, "c": 1}),
}
ENDED = {
    "0_done": Ended({"outcome": "done", "code": 0}, 0),
    "0_without_a_word": Ended(None, 0, lost=True, rests=True),
    "1_bug": Ended({"outcome": "failed", "code": 1, "text": "a bug"}, 1, lost=True, rests=True),
    "2_config": Ended({"outcome": "failed", "code": 2}, 2, ends=2),
    "2_without_a_word": Ended(None, 2, lost=True, rests=True),  # It may be that host's own fault: others are tried.
    "9_cut_off": Ended(None, 9, lost=True, rests=True),
    "75_alone": Ended({"outcome": "stopped", "code": 75, "signalled": True}, 75, rests=True),
    "75_without_a_word": Ended(None, 75, lost=True, rests=True),
    "signal": Ended(None, -11, lost=True, rests=True),
}


class Fake:
    """A process that ends when it is told to."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.pid, self.code = ticket, 1, None

    code: int | None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9 if self.code is None else self.code


class Scene:
    """A driver whose loop is turned by hand."""

    def __init__(self, directory: Path, said: Said) -> None:
        script = directory / "hosts.sh"
        script.write_text(f"#!/bin/sh\n{said.script}\n")
        script.chmod(0o755)
        self.started: list[Fake] = []
        self.journal = directory / "elastic.jsonl"
        found = Script(str(script), slots=1, timeout_s=0.3 if "sleep" in said.script else 20)
        self.driver = Driver(RULES, discovery=found, spawner=self, journal=Journal(self.journal), address="127.0.0.1", interface="lo",
                             beat_s=1, gloo_timeout_s=5, discovery_every_s=1, grace_s=1)  # type: ignore[arg-type] # fmt: skip
        self.roster = self.driver.roster
        self.roster.discovered(KNOWN)

    def spawn(self, ticket: Ticket) -> Fake:
        self.started.append(Fake(ticket))
        return self.started[-1]

    def turn(self, *, after_s: float = 0) -> int | None:
        """Once around the driver's loop; the code with which the job ends, if it does."""
        with self.driver._changed:
            self.driver._reap()
            actions = self.roster.tick(time.monotonic() + after_s)
            self.driver._do(actions)
        return None if actions.end is None else actions.end[0]

    def ready(self, *members: str) -> None:
        for member in members:
            self.roster.ready(member, now=time.monotonic())

    def begin(self) -> None:
        """A world of two: rank 0 on a, rank 1 on b."""
        self.turn()
        self.ready("member-1", "member-2")
        self.turn()
        assert [entry.slot.host for entry in self.roster.places()] == ["a", "b"]

    def end(self, how: Ended) -> None:
        if how.report is not None:
            told = self.driver._serve("member-2", "/report", {"generation": 0, **how.report})
            assert told == {"go_on": False}
        self.started[1].code = how.code

    def told(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in map(json.loads, self.journal.read_text().splitlines()) if entry["event"] == event]


@pytest.mark.parametrize(("said", "how"), list(itertools.product(SAID, ENDED)))
def test_what_is_decided(said: str, how: str, tmp_path: Path) -> None:
    answer, ended = SAID[said], ENDED[how]
    scene = Scene(tmp_path, answer)
    try:
        scene.begin()
        scene.driver._look()
        scene.driver._look()  # The same once more: an error is told once.
        assert scene.roster.target == answer.hosts
        assert [answer.error in entry["error"] for entry in scene.told("discovery")] == [True] * bool(answer.error)

        scene.end(ended)
        assert scene.turn() == ended.ends
        assert [entry["code"] for entry in scene.told("gone")] == [ended.code]
        assert scene.roster.losses == int(ended.lost)
        if ended.ends is not None:
            assert len(scene.started) == 2, "nobody starts in a job that ends"
            return
        finishing = how == "0_done"  # rank 0 is about to be done as well
        newcomers = ["c"] if said == "adds_c" and not finishing else []
        assert [process.ticket.host for process in scene.started[2:]] == newcomers

        # Rank 0 goes on where it was left alone, and its slot of b is filled when it has rested.
        if ended.lost:
            assert scene.driver._serve("member-1", "/report", {"generation": 0, "outcome": "lost", "code": 9}) == {
                "go_on": True
            }
            scene.ready("member-1")
            assert scene.turn() is None
            assert [entry.member for entry in scene.roster.places()] == ["member-1"]
        assert scene.turn(after_s=59) is None
        assert [process.ticket.host for process in scene.started[2:]] == newcomers
        assert (Slot("b", 0) in scene.roster._not_before) is ended.rests
        assert scene.turn(after_s=61) is None
        back = ["b"] if "b" in answer.hosts and not finishing else []
        assert [process.ticket.host for process in scene.started[2:]] == newcomers + back

        # Once more, and it is more than reset_limit=1 allows.
        if ended.lost:
            scene.started[0].code = ended.code
            assert scene.turn(after_s=62) == 9
        else:
            scene.driver._serve("member-1", "/report", {"generation": 0, "outcome": "done", "code": 0})
            assert scene.turn() == 0
    finally:
        scene.driver.rendezvous._server.server_close()
