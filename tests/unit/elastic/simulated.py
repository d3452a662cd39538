"""A roster with a clock of its own and ranks that do what they are told."""

from __future__ import annotations

from collections import Counter

from horovod_jobs.launch.elastic.entries import Actions, Rules, State
from horovod_jobs.launch.elastic.roster import Roster

RULES = Rules(min_np=1, max_np=4, start_s=60, wait_s=0, lease_s=10, return_s=30, cooldown_s=5, reset_limit=100)


class Job:
    """A roster with a clock, and ranks that do what they are told."""

    def __init__(self, rules: Rules = RULES, **hosts: int) -> None:
        self.now = 100.0
        self.roster = Roster(rules, now=self.now)
        self.roster.discovered(hosts)
        self.rules = rules
        self.formed: list[list[str]] = []
        self.back: list[object] = []  # places whose ranks have told that their world is over

    def tick(self, seconds: float = 0.1) -> Actions:
        self.now += seconds
        for entry in self.roster.entries.values():
            entry.heard = self.now
        actions = self.roster.tick(self.now)
        if actions.formed:
            self.check_world()
            self.formed.append([entry.member for entry in self.roster.places()])
        for member, why in actions.kill:
            self.roster.ended(member, code=-9, now=self.now, why=why)
        return actions

    def all_join(self) -> Actions:
        """New ranks come, those of a world that is to change come back; then what follows from it."""
        self.tick()
        working = [entry.member for entry in self.roster.places()]
        if any(self.roster.orders(member, now=self.now) for member in working):  # A stop is agreed by all.
            for member in working:
                self.report(member, "stopped")
        for member in list(self.roster.entries):
            self.join(member)
        return self.tick()

    def join(self, member: str) -> None:
        """A rank asks for a place, if it is one that does: new, or back from a world that has ended for it."""
        entry = self.roster.entries[member]
        if entry.state is State.WORKING and self.roster._broken_at is not None and entry.place not in self.back:
            self.report(member, "lost")
        waits = entry.state in (State.STARTING, State.READY)
        if waits or (entry.state is State.WORKING and entry.place in self.back):
            if self.roster.must_leave(member):
                self.roster.leaving.add(member)
                self.roster.ended(member, code=0, now=self.now)
            else:
                self.roster.ready(member, now=self.now)

    def report(self, member: str, outcome: str, *, code: int = 9, signalled: bool = False) -> bool:
        self.back.append(self.roster.entries[member].place)
        return self.roster.reported(
            member,
            generation=self.roster.generation,
            outcome=outcome,
            code=code,
            text="it was",
            signalled=signalled,
            now=self.now,
        )

    def kill(self, member: str) -> None:
        self.roster.ended(member, code=-9, now=self.now)

    def check_world(self) -> None:
        entries = self.roster.places()
        places = [entry.place for entry in entries]
        assert self.rules.min_np <= len(entries) <= self.rules.max_np
        assert len({entry.slot for entry in entries}) == len(entries)
        assert all(entry.slot.index < self.roster.target.get(entry.slot.host, 0) for entry in entries)
        hosts = Counter(entry.slot.host for entry in entries)
        at = list(dict.fromkeys(entry.slot.host for entry in entries))
        for rank, (entry, place) in enumerate(zip(entries, places, strict=True)):
            assert place is not None
            assert (place.generation, place.rank, place.size) == (self.roster.generation, rank, len(entries))
            assert place.local_size == hosts[entry.slot.host]
            across = [host for host in at if hosts[host] > place.local_rank]
            assert (place.cross_rank, place.cross_size) == (across.index(entry.slot.host), len(across))
        told = {(entry.slot.host, place.local_rank) for entry, place in zip(entries, places, strict=True) if place}
        assert told == {(host, rank) for host, count in hosts.items() for rank in range(count)}
