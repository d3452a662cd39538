"""The parent of an elastic job: it watches hosts and ranks, and gives each world's ranks their places until the job has ended."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from horovod_jobs import early
from horovod_jobs.comm.member import Ticket
from horovod_jobs.comm.signing import new_key
from horovod_jobs.errors import SetupError, WorldError
from horovod_jobs.launch.elastic.discovery import Discovery
from horovod_jobs.launch.elastic.entries import Actions, Rules, State
from horovod_jobs.launch.elastic.rendezvous import Rendezvous
from horovod_jobs.launch.elastic.roster import Roster
from horovod_jobs.launch.elastic.spawn import Process, Spawner

_TICK_S = 0.1
_JOIN_WAIT_S = 5.0  # how long a member's question for a place is held
_REFUSALS_SHOWN = 100  # A flood of them must not fill the disk.
_END_S = 20.0  # for ranks to end by themselves once the job has


class Journal:
    """What happened to the world, as JSON lines in ``<run>/elastic.jsonl`` and, in short, on standard error.

    Rank 0 makes the run's directory when it knows that the job can run; until then the lines are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._lock = threading.Lock()

    def note(self, event: str, *, shown: str = "", **fields: Any) -> None:
        """Write a line; ``shown`` is for the person."""
        with self._lock:
            self._waiting.append(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
        self.write()
        if shown:
            sys.stderr.write(f"elastic: {shown}\n")
            sys.stderr.flush()

    def write(self) -> None:
        """Write what waits, if that is possible now: a full disk does not end the job here."""
        with self._lock, contextlib.suppress(OSError):
            if self._waiting and self._path.parent.is_dir():
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write("".join(self._waiting))
                self._waiting.clear()


class Driver:
    """Runs one elastic job.

    Args:
        rules: how it may grow, shrink and recover.
        discovery: which hosts there are.
        spawner: starts a rank.
        address: of the job's interface; the rendezvous listens there and nowhere else.
        interface: its name, for the ranks' own connections; empty: on each host the one that leads to the driver.
        beat_s, gloo_timeout_s: given to the ranks.
        discovery_every_s: time between two looks at the hosts.
        grace_s: for a checkpoint after Ctrl-C or SIGTERM, before ranks are killed.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        discovery: Discovery,
        spawner: Spawner,
        journal: Journal,
        address: str,
        interface: str,
        beat_s: float,
        gloo_timeout_s: int,
        discovery_every_s: float,
        grace_s: float,
    ) -> None:
        self.rules, self.discovery, self.spawner, self.journal = rules, discovery, spawner, journal
        self.address, self.interface = address, interface
        self.beat_s, self.gloo_timeout_s = beat_s, gloo_timeout_s
        self.discovery_every_s, self.grace_s = discovery_every_s, grace_s
        self.roster = Roster(rules, now=time.monotonic())
        self.processes: dict[str, Process] = {}
        self._changed = threading.Condition()  # guards the roster
        self._key = new_key()
        self._deadline: float | None = None  # of a stop
        self._over = threading.Event()
        self._refusals = 0
        self._blind = ""  # why discovery did not answer the last time
        self.rendezvous = Rendezvous(address, self._key, serve=self._serve, refused=self._refused)

    def run(self) -> int:
        """Run the job to its end; gives its exit code.

        Raises:
            WorldError: too many ranks were lost, or too few are left.
            SetupError: the first world did not come about.
        """
        self.rendezvous.start()
        try:
            self.roster.discovered(self.discovery.find())
            threading.Thread(target=self._discover, name="elastic.discovery", daemon=True).start()
            with self._signals():
                code, text = self._loop()
                self._let_end()
        finally:
            self._over.set()
            for process in self.processes.values():
                process.kill()
            self.rendezvous.close()
        self.journal.note("end", code=code, generations=self.roster.generation + 1, losses=self.roster.losses,
                          refusals=self._refusals)  # fmt: skip
        if self.roster.stop and (self.roster.generation < 0 or code > 128 + signal.SIGINT):
            # No rank was there to say it, or none did in time.
            number = signal.SIGINT if self.roster.stop == 2 else signal.SIGTERM
            print(f"error: {early.said(number)}", file=sys.stderr, flush=True)
        if text:
            raise (SetupError if code == SetupError.exit_code else WorldError)(text)
        return code

    # --- the loop ---------------------------------------------------------------------------------------------------
    def _loop(self) -> tuple[int, str]:
        while True:
            with self._changed:
                self._reap()
                self.journal.write()
                if self.roster.broken:
                    self.rendezvous.store.begin(-1)  # Who still looks for the others is told that it is in vain.
                actions = self.roster.tick(time.monotonic())
                self._do(actions)
                if actions.end is not None:
                    return actions.end
                if self._deadline is not None and time.monotonic() > self._deadline:
                    return (130 if self.roster.stop == 2 else 128 + signal.SIGTERM), ""
                self._changed.wait(_TICK_S)

    def _do(self, actions: Actions) -> None:
        for member, why in actions.kill:
            entry = self.roster.entries[member]
            self.journal.note(
                "kill", member=member, host=entry.slot.host, why=why, shown=f"{member} {why}; it is ended"
            )
            self.processes[member].kill()
            self._gone(member, code=-signal.SIGKILL, why=why)
        if actions.formed:
            self.rendezvous.store.begin(self.roster.generation)
            entries = self.roster.places()
            ranks = [
                {"member": entry.member, "host": entry.slot.host, "pid": self.processes[entry.member].pid}
                for entry in entries
            ]
            hosts = ", ".join(dict.fromkeys(entry.slot.host for entry in entries))
            self.journal.note("world", generation=self.roster.generation, size=len(ranks), ranks=ranks,
                              shown=f"world {self.roster.generation}: {len(ranks)} ranks on {hosts}")  # fmt: skip
            self._changed.notify_all()
        for member, slot in actions.spawn:
            process = self.processes[member] = self.spawner.spawn(self._ticket(member, slot.host))
            self.journal.note("start", member=member, host=slot.host, slot=slot.index, pid=process.pid)

    def _ticket(self, member: str, host: str) -> Ticket:
        self.rendezvous.expect(member)
        return Ticket(member, self._key.hex(), self.address, self.rendezvous.port, host, self.interface, self.beat_s,
                      self.rules.lease_s, self.gloo_timeout_s, environment={"HOROVOD_CONTROLLER": "gloo"})  # fmt: skip

    def _reap(self) -> None:
        for member, process in list(self.processes.items()):
            if (code := process.poll()) is not None:
                process.kill()  # What it started.
                self._gone(member, code=code)

    def _gone(self, member: str, *, code: int, why: str = "") -> None:
        del self.processes[member]
        losses = self.roster.losses
        self.roster.ended(member, code=code, now=time.monotonic(), why=why)
        self.journal.note("gone", member=member, code=code, lost=self.roster.losses > losses)
        self._changed.notify_all()

    def _let_end(self) -> None:
        """Wait for the ranks to end by themselves."""
        deadline = self._deadline or time.monotonic() + _END_S
        with self._changed:
            self._changed.notify_all()
            while time.monotonic() < deadline:
                self._reap()
                if not any(self.roster.entries[member].state is not State.STARTING for member in self.processes):
                    return  # Who has not joined yet is not waited for.
                self._changed.wait(_TICK_S)

    def _discover(self) -> None:
        while not self._over.wait(self.discovery_every_s):
            self._look()

    def _look(self) -> None:
        """Ask discovery once. What it cannot tell changes nothing, and is told once."""
        try:
            hosts = self.discovery.find()
        except SetupError as error:
            if str(error) != self._blind:
                self.journal.note("discovery", error=str(error), shown=f"{error}; the hosts known before are kept")
            self._blind = str(error)
            return
        self._blind = ""
        with self._changed:
            if hosts != self.roster.target:
                self.journal.note(
                    "hosts",
                    hosts=hosts,
                    shown="hosts are now " + (", ".join(f"{h}:{n}" for h, n in hosts.items()) or "none"),
                )
                self.roster.discovered(hosts)
                self._changed.notify_all()

    # --- what members ask -------------------------------------------------------------------------------------------
    def _serve(self, member: str, path: str, values: dict[str, Any]) -> dict[str, Any] | None:
        with self._changed:
            if not self.roster.heard(member, now=time.monotonic()):
                return None
            if path == "/beat":
                return {"stop": self.roster.orders(member, now=time.monotonic())}
            if path == "/report":
                return {"go_on": self._report(member, values)}
            if path == "/join":
                return self._place(member, int(values.get("generation", -1)))
        return None

    def _report(self, member: str, values: dict[str, Any]) -> bool:
        outcome, code, text = str(values.get("outcome")), int(values.get("code", 1)), str(values.get("text", ""))[:500]
        go_on = self.roster.reported(
            member,
            generation=int(values.get("generation", -1)),
            outcome=outcome,
            code=code,
            text=text,
            signalled=bool(values.get("signalled")),
            now=time.monotonic(),
        )
        self.journal.note("report", member=member, outcome=outcome, code=code, text=text, go_on=go_on)
        self._changed.notify_all()
        return go_on

    def _place(self, member: str, before: int) -> dict[str, Any]:
        """Hold the question until there is a place, for a few seconds; a lost answer is given again."""
        deadline = time.monotonic() + min(_JOIN_WAIT_S, self.rules.lease_s / 3)
        while (entry := self.roster.entries.get(member)) is not None:
            if entry.state is State.WORKING and entry.place is not None and entry.place.generation > before:
                return {"place": vars(entry.place)}
            if self.roster.must_leave(member):
                self.roster.leaving.add(member)
                return {"leave": True}
            self.roster.ready(member, now=time.monotonic())
            if time.monotonic() >= deadline:
                return {}
            self._changed.wait(_TICK_S)
        return {"leave": True}

    def _refused(self, peer: str, why: str) -> None:
        self._refusals += 1
        if self._refusals <= _REFUSALS_SHOWN:
            self.journal.note("refused", peer=peer, why=why, shown=f"a request from {peer} was {why.partition(' ')[2]}")
        if self._refusals == _REFUSALS_SHOWN:
            self.journal.note("refused", shown="further refusals are counted only")

    # --- signals ----------------------------------------------------------------------------------------------------
    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._asked) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        # No lock: the main thread may hold it. One assignment each; the next beat of each rank takes the order along.
        first = self._deadline is None
        self.roster.stop = max(self.roster.stop, 2 if number == signal.SIGINT else 1)
        self._deadline = time.monotonic() + (self.grace_s if first else 0.0)
