"""Who is in an elastic job, and what is to be done next. Pure: it is told what happened and when, and starts or ends nothing itself.

A member is a process in a slot of a host. It starts, is ready (it waits for a place), works in a generation, and is ready again when
that one has ended. A generation forms of ready members when nobody works any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from horovod_jobs.comm.member import Place
from horovod_jobs.errors import Interrupted, JobError, SetupError, WorldError
from horovod_jobs.launch.elastic.entries import Actions, Entry, Rules, Slot, State

_BACKOFF_LIMIT = 16
_STALL_S = 2.0
_NAMED_S = 1.0
_STEADY_S = 600.0  # A slot whose member lived so long begins its cooldowns anew.
_GATHER_S = 10.0  # Newcomers wait so long for others that are starting: one new world for all.


class Roster:
    """The state of an elastic job. ``now`` is a monotonic clock in seconds throughout."""

    def __init__(self, rules: Rules, *, now: float) -> None:
        self.rules = rules
        self.entries: dict[str, Entry] = {}
        self.target: dict[str, int] = {}
        self.generation = -1
        self.stop = 0  # the code of a stop that the person or the cluster asked for
        self.losses = 0
        self.leaving: set[str] = set()
        self._failures: Counter[Slot] = Counter()
        self._not_before: dict[Slot, float] = {}
        self._born = 0
        self._broken_at: float | None = None  # when the generation that works, or worked last, was found to be broken
        self._died = False  # the process that was lost last has been seen to end
        self._settling = False  # its ranks have begun to stop, as agreed
        self._finishing = False  # one of its ranks has done the job: the others are about to
        self._idle_since: float | None = now  # when the last member stopped working
        self._end: tuple[int, str] | None = None
        self._last_loss = ""
        self._ticked = now

    # --- what happened ----------------------------------------------------------------------------------------------
    def discovered(self, hosts: Mapping[str, int]) -> None:
        """These hosts are there now, with so many slots each."""
        self.target = dict(hosts)

    def heard(self, member: str, *, now: float) -> bool:
        """A member has spoken; whether it is known."""
        entry = self.entries.get(member)
        if entry is not None:
            entry.heard = now
        return entry is not None

    def ready(self, member: str, *, now: float) -> None:
        """A member waits for a place."""
        self.entries[member].turn(State.READY, now)
        self._note_idle(now)

    def reported(
        self, member: str, *, generation: int, outcome: str, code: int, text: str, signalled: bool, now: float
    ) -> bool:
        """A member tells how its world ended; whether it is to go on."""
        entry = self.entries[member]
        over = self._end is not None or bool(self.stop)
        if outcome in ("lost", "restart"):
            if generation == self.generation:
                self._break(now, f"{self._name(entry)}: {text}", planned=self._settling)
            if outcome == "restart":
                entry.turn(State.STARTING, now)
                self._note_idle(now)
            return not over
        if outcome == "stopped":
            self._settling = True
            if not over and not signalled:
                return True
        entry.turn(State.DONE, now)
        self._note_idle(now)
        if outcome == "stopped":
            self._leaves(entry, now)
        elif outcome == "done":
            self._finishing = True
            if entry.place is not None and entry.place.rank == 0:
                self._finish(0, "")
        elif _is_final(code):
            self._finish(code, "")  # The rank says why.
        else:
            self._break(now, f"{self._name(entry)} failed: {text}")
        return False

    def ended(self, member: str, *, code: int, now: float, why: str = "") -> None:
        """A member's process has ended."""
        entry = self.entries.pop(member, None)
        if entry is None:
            return
        self._note_idle(now)
        if member in self.leaving:
            self.leaving.discard(member)
            return
        if self._end is not None or self.stop or (entry.state is State.DONE and code == 0):
            return
        if now - entry.born > _STEADY_S:
            del self._failures[entry.slot]
        if entry.state is State.STARTING and _is_final(code) and self.generation < 0:
            self._finish(code, "")  # It has said why itself. Later it would be that host's own fault.
            return
        self._failures[entry.slot] += 1
        pause_s = self.rules.cooldown_s * min(_BACKOFF_LIMIT, 2 ** (self._failures[entry.slot] - 1))
        self._not_before[entry.slot] = now + pause_s
        how = why or (f"was ended by signal {-code}" if code < 0 else f"ended with code {code}")
        text = f"{self._name(entry)} {how}"
        if entry.place is not None and entry.place.generation == self.generation and entry.state is not State.READY:
            self._break(now, text)
            self._last_loss, self._died = text, True  # Who is dead says more than who has noticed it.
        elif not self.places():  # While others work, one that does not start costs nothing but its cooldown.
            self.losses, self._last_loss, self._died = self.losses + 1, text, True

    # --- what is to be done -----------------------------------------------------------------------------------------
    def orders(self, member: str, *, now: float) -> int:
        """What a member that works is asked to do: 0 nothing, 1 or 2 stop with a checkpoint."""
        if self.stop or (self._end is not None and self._end[0]):
            return max(1, self.stop)
        entry = self.entries.get(member)
        return int(entry is not None and entry.state is State.WORKING and self._wants_reform(now))

    def tick(self, now: float) -> Actions:
        """What the passing of time makes due."""
        actions = Actions()
        # What was said while the driver itself was stopped is still unread: nobody is silent because of that.
        missed_s, self._ticked = now - self._ticked, now
        for entry in self.entries.values() if missed_s > _STALL_S else ():
            entry.heard = now
        self._check_leases(actions, now)
        too_many = self.losses > self.rules.reset_limit
        # Others notice a moment before the lost process has ended: wait for that, to name it.
        told = self._died or self._broken_at is None or now - self._broken_at >= _NAMED_S
        if self._end is None and too_many and told:
            text = (
                f"ranks were lost {self.losses} times, more than launch.elastic.reset_limit={self.rules.reset_limit} (the last: "
                f"{self._last_loss}); see the log files; the same command goes on from the last checkpoint"
            )
            self._finish(WorldError.exit_code, text)
        if self._end is None and self.stop and not any(entry.state is State.WORKING for entry in self.entries.values()):
            self._finish(Interrupted.exit_code if self.stop == 1 else 130, "")
        if self._end is not None:
            actions.end = self._end
            return actions
        if not self.stop and not too_many:
            self._spawn(actions, now)
            actions.formed = self._form(now)
        actions.end = self._end
        return actions

    def _check_leases(self, actions: Actions, now: float) -> None:
        rules = self.rules
        for entry in self.entries.values():
            silent_s = now - entry.heard
            if entry.state is State.STARTING and now - entry.since > rules.start_s:
                actions.kill.append((entry.member, f"has not reported within start_s={rules.start_s:g}"))
            # A member ends itself after lease_s without an answer: a second more, and it is certain that it does nothing.
            elif entry.state is not State.STARTING and silent_s > rules.lease_s + 1.0:
                actions.kill.append((entry.member, f"was silent for {silent_s:.1f} s"))
            elif (
                entry.state is State.WORKING and self._broken_at is not None and now - self._broken_at > rules.return_s
            ):
                actions.kill.append((entry.member, f"did not come back within return_s={rules.return_s:g} of a loss"))

    def _spawn(self, actions: Actions, now: float) -> None:
        if self._finishing and any(entry.state is State.WORKING for entry in self.entries.values()):
            return  # Who has done its part leaves a slot that needs nobody.
        taken = {entry.slot for entry in self.entries.values()}
        slots = self._slots()
        room = self.rules.max_np - sum(entry.slot in slots for entry in self.entries.values())
        for slot in slots:
            if room > 0 and slot not in taken and now >= self._not_before.get(slot, now):
                self._born += 1
                member = f"member-{self._born}"
                self.entries[member] = Entry(member, slot, born=now, heard=now, since=now)
                actions.spawn.append((member, slot))
                room -= 1

    def _form(self, now: float) -> bool:
        if self._idle_since is None:
            return False
        ready = self._eligible()
        waited_s = now - self._idle_since
        if len(ready) < self.rules.min_np:
            if waited_s > self.rules.start_s:
                self._finish(SetupError.exit_code if self.generation < 0 else WorldError.exit_code,
                             f"{len(ready)} of at least launch.elastic.min_np={self.rules.min_np} ranks are there after "
                             f"{waited_s:.0f} s; add hosts to what launch.elastic.discovery prints, or lower min_np; "
                             "the same command goes on from the last checkpoint")  # fmt: skip
            return False
        wanted = min(self.rules.max_np, len(self._slots()))
        patience_s = self.rules.start_s if self.generation < 0 else self.rules.wait_s
        if len(ready) < wanted and waited_s < patience_s:
            return False
        self._assign(ready, now)
        return True

    def _assign(self, ready: list[Entry], now: float) -> None:
        self.generation += 1
        self._broken_at, self._idle_since, self._settling, self._died = None, None, False, False
        self._finishing = False
        per_host: dict[str, list[Entry]] = {}
        for entry in ready:
            per_host.setdefault(entry.slot.host, []).append(entry)
        # The member that has been there longest comes first: it has the commits, and rank 0 speaks for all.
        groups = sorted(per_host.values(), key=lambda group: (group[0].born, group[0].slot))
        rank = 0
        for group in groups:
            for local_rank, entry in enumerate(group):
                across = [other for other in groups if len(other) > local_rank]
                entry.place = Place(
                    self.generation, rank, len(ready), local_rank, len(group), across.index(group), len(across)
                )
                entry.turn(State.WORKING, now)
                rank += 1

    # --- helpers ----------------------------------------------------------------------------------------------------
    @property
    def broken(self) -> bool:
        """Whether the generation that works has lost a member."""
        return self._broken_at is not None

    def places(self) -> list[Entry]:
        """The members of the generation that works, by rank."""
        working = [entry for entry in self.entries.values() if entry.state is State.WORKING and entry.place is not None]
        return sorted(working, key=lambda entry: entry.place.rank if entry.place else 0)

    def _slots(self) -> list[Slot]:
        return [Slot(host, index) for host, count in self.target.items() for index in range(count)]

    def _eligible(self) -> list[Entry]:
        slots = set(self._slots())
        ready = [entry for entry in self.entries.values()
                 if entry.state is State.READY and entry.slot in slots and entry.member not in self.leaving]  # fmt: skip
        ready.sort(key=lambda entry: (entry.place is None, entry.born, entry.slot))
        return ready[: self.rules.max_np]

    def must_leave(self, member: str) -> bool:
        """Whether a member that waits has no place any more."""
        entry = self.entries[member]
        if self._end is not None or self.stop or member in self.leaving:
            return True
        return entry.slot not in self._slots()

    def _wants_reform(self, now: float) -> bool:
        slots = set(self._slots())
        working = [entry for entry in self.entries.values() if entry.state is State.WORKING]
        ready = [entry for entry in self.entries.values() if entry.state is State.READY and entry.slot in slots]
        starting = any(entry.state is State.STARTING for entry in self.entries.values())
        newcomers = any(not starting or now - entry.since > _GATHER_S for entry in ready)
        gone = [entry for entry in working if entry.slot not in slots]
        if gone and len(working) - len(gone) < self.rules.min_np and not newcomers:
            return False  # Better on a host that is going than not at all.
        return bool(gone) or (newcomers and len(working) < self.rules.max_np)

    def _leaves(self, entry: Entry, now: float) -> None:
        """A rank that got a signal of its own goes, and its slot rests; where all ranks got one, that is a stop of the job."""
        if self.stop or self._end is not None:
            return
        self.leaving.add(entry.member)
        self._not_before[entry.slot] = now + self.rules.cooldown_s
        if all(other.state is State.DONE for other in self.entries.values() if other.place is not None):
            self.stop = 1

    def _break(self, now: float, text: str, *, planned: bool = False) -> None:
        """The generation has lost a member; counted once, however many there are. Who sees others leave as planned has lost nobody."""
        if self._broken_at is None:
            self._broken_at = now
            if not planned:
                self.losses, self._last_loss = self.losses + 1, text

    def _note_idle(self, now: float) -> None:
        if self._idle_since is None and not any(entry.state is State.WORKING for entry in self.entries.values()):
            self._idle_since = now

    def _finish(self, code: int, text: str) -> None:
        if self._end is None or (self._end[0] == 0 and code):
            self._end = (code, text)

    def _name(self, entry: Entry) -> str:
        rank = f"rank {entry.place.rank}" if entry.place is not None else entry.member
        return f"{rank} on {entry.slot.host}"


def _is_final(code: int) -> bool:
    """Whether a rank's exit code ends the job: an error that it would meet again, and not the loss of another rank."""
    return code in {cls.exit_code for cls in JobError.__subclasses__()} - {WorldError.exit_code, Interrupted.exit_code}
