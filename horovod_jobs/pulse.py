"""Each rank's sign of life, written beside the run; and a watchdog that reads the others' when this rank waits for too long.

A rank that is stopped, cut off or lost in a loop cannot say so, and the collectives of the others wait for it without end. A thread of
every rank writes what the rank is doing into ``<run>/ranks/``: the main thread's stack says which collective it waits in, so the
training loop itself pays nothing. Times are counted by each rank on its own monotonic clock: clocks that differ or jump do no harm.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from horovod_jobs.console import Console
from horovod_jobs.errors import WorldError

DIRECTORY = "ranks"
INTERVAL_S = 2.0
TELL_BEATS = 5
ENDED_LIMIT_S = 4.0
_ALARM = "alarm"
_CHANNEL, _WAITS = "horovod_jobs.comm.channel", ("wait_until", "sleep_until")


class Place(Protocol):
    """Who a rank is: a World is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Apart:
    """The place of a rank that belongs to no world and waits for nobody: a parameter server's."""

    rank: int
    size: int = 1


class Pulse:
    """The thread. ``start`` and ``stop`` are for whoever runs this rank's work.

    Args:
        world: this rank's; it waits for the others of it.
        run_dir: the run's directory, which all ranks see.
        console: knows how far the work is.
        silent_limit_s: a rank that gives no sign of life for so long while others wait for it ends the job; None: never.
        stall_limit_s: the same for a wait in which every rank gives signs of life; None: never.
        ended_limit_s: the same for a rank that has ended by itself, which in the middle of a run is an error of its own; None: never,
            where the world is about to be made anew without it.
        end: called in this thread with the error and the ranks that cannot tell it themselves; must not return.
        servers: ranks that are not in the world and that this one waits for all the same.
        tell: hears every ``TELL_BEATS`` beats how many ranks there are and which of them are silent.
    """

    def __init__(
        self,
        world: Place,
        *,
        run_dir: Path,
        console: Console,
        silent_limit_s: float | None,
        stall_limit_s: float | None,
        ended_limit_s: float | None = None,
        end: Callable[[WorldError, list[int]], None],
        servers: Sequence[int] = (),
        tell: Callable[[dict[str, Any]], None] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._world, self._console, self._end, self._interval_s = world, console, end, interval_s
        self._silent_limit_s, self._stall_limit_s = silent_limit_s, stall_limit_s
        self._ended_limit_s = ended_limit_s
        looks = [(silent_limit_s, 4), (stall_limit_s, 4), (ended_limit_s, 1)]
        self._looks_after_s = min((limit / part for limit, part in looks if limit is not None), default=None)
        self._directory, self._logs = run_dir / DIRECTORY, run_dir / "logs"
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._beat = 0
        self._wait = Wait()
        self._others = Others(world, self._directory, servers)
        self._tell, self._told_of = tell, Others(world, self._directory, servers)
        self._dumped = ""  # the alarm whose stacks are written

    def start(self) -> None:
        """Begin. This rank's work is that of the calling thread."""
        self._directory.mkdir(exist_ok=True)
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """Write the last sign of life and end the thread."""
        self._over.set()
        self._thread.join(timeout=5)
        self._write(ended=True)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._interval_s):
            now = time.monotonic()
            if now - last > 3 * self._interval_s + 1:  # This rank itself was stopped: what it has seen is old.
                self._wait = Wait()
                self._others.forget()
                self._told_of.forget()
            last = now
            self._wait.look(self._watched, self._console.now, now=now)
            self._write()
            self._dump_if_asked()
            self._tell_of_others(now)
            self._check(now)

    # --- what this rank says --------------------------------------------------------------------------------------------
    def _write(self, *, ended: bool = False) -> None:
        self._beat += 1
        label, done, total, note = self._console.now
        sign = {
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": self._beat,
            "time": round(time.time(), 3),
            "every_s": self._interval_s,
            "doing": label,
            "done": done,
            "total": total,
            "note": note,
            "waiting_in": self._wait.name,
            "waiting_s": round(self._wait.seconds, 1),
            "ended": ended,
        }
        path = self._directory / f"rank-{self._world.rank}.json"
        try:  # Not by storage.write_text: a sign of life need not survive a power cut, and a full disk must not end the job here.
            new = path.with_suffix(".new")
            new.write_text(json.dumps(sign), encoding="utf-8")
            new.replace(path)
        except OSError:
            return

    def _dump_if_asked(self) -> None:
        try:
            asked = (self._directory / _ALARM).read_text(encoding="utf-8")
        except OSError:
            return
        if asked != self._dumped:
            self._dumped = asked
            self._dump()

    def _dump(self) -> None:
        """Append the stack of every thread of this rank to its file."""
        try:
            with (self._logs / f"stacks-{self._world.rank}.txt").open("a", encoding="utf-8") as stream:
                stream.write(f"--- rank {self._world.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError:
            return

    def _tell_of_others(self, now: float) -> None:
        if self._tell is None or self._beat % TELL_BEATS:
            return
        self._told_of.look(now)
        silent = self._told_of.silent(now, limit_s=TELL_BEATS * self._interval_s)
        self._tell({"event": "ranks", "size": 1 + len(self._told_of.ranks), "silent": silent})

    # --- what it makes of the others ------------------------------------------------------------------------------------
    def _check(self, now: float) -> None:
        least_s = self._looks_after_s
        if least_s is None or not self._others.ranks or self._wait.seconds < least_s:
            self._others.forget()
            return
        self._others.look(now)
        silent = self._others.silent(now, limit_s=self._silent_limit_s)
        found = self._verdict(silent)
        if found is None:
            return
        error, missing = found
        with contextlib.suppress(OSError):
            (self._directory / _ALARM).write_text(f"rank {self._world.rank} after {self._beat} beats", encoding="utf-8")
        self._dump()
        time.sleep(2 * self._interval_s)  # The others write their stacks.
        label = self._wait.name
        self._wait.look(self._watched, self._console.now, now=time.monotonic())
        if self._wait.name != label or self._wait.seconds < least_s or self._over.is_set():
            return  # It came after all.
        self._end(error, missing)

    def _verdict(self, silent: list[int]) -> tuple[WorldError, list[int]] | None:
        """Why the job is over, and the ranks that cannot say so: they are silent, or at work on something else."""
        waits = f"rank {self._world.rank} has waited in {self._wait.name!r} for {self._wait.seconds:.0f} s"
        files = f"stacks of the ranks that can still write are in {self._logs}/stacks-*.txt"
        goes_on = "the same command goes on from the last checkpoint"
        if silent and self._silent_limit_s is not None and self._wait.seconds > self._silent_limit_s:
            names = ", ".join(self._others.describe(rank) for rank in silent)
            text = (
                f"{waits}, and {names} gave no sign of life for {self._silent_limit_s:g} s (run.silent_limit_s): stopped, cut off, or "
                f"its host is down; {files}; {goes_on}"
            )
            return WorldError(text), silent
        ended = self._others.ended()
        if ended and self._ended_limit_s is not None and self._wait.seconds > self._ended_limit_s:
            names = " and ".join(self._others.describe(rank) for rank in ended)
            text = f"{waits}, and {names} has ended with an error of its own, which its log tells; {goes_on}"
            return WorldError(text), silent
        if self._stall_limit_s is not None and self._wait.seconds > self._stall_limit_s:
            text = f"{waits} (run.stall_limit_s={self._stall_limit_s:g}), and the others are: {self._others.doing()}; {files}; {goes_on}"
            return WorldError(text), self._others.at_work()
        return None


class SignsOfLife:
    """Those of a rank that belongs to no world, a parameter server's, for one run after another; it waits for nobody and watches nobody."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._pulse: Pulse | None = None

    def __enter__(self) -> SignsOfLife:
        return self

    def __exit__(self, *error: object) -> None:
        self.begin(None)

    def begin(self, run_dir: str | None) -> None:
        """Give them in this run's directory from now on; None: nowhere. One that this host does not see gets none."""
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None
        if run_dir is not None and Path(run_dir).is_dir():
            console = Console(is_main=False, mode="none")
            console.note(("serving parameters", 0, 0, ""))
            self._pulse = Pulse(
                Apart(self._rank), run_dir=Path(run_dir), console=console, silent_limit_s=None, stall_limit_s=None, end=_never
            )  # fmt: skip
            self._pulse.start()


def _never(error: WorldError, silent: list[int]) -> None:
    """It has no limits."""


class Wait:
    """Which collective a thread waits in, and for how long it has been the same."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.seconds = 0.0
        self._token: Any = None
        self._since = 0.0

    def look(self, thread: int, progress: Any, *, now: float) -> None:
        found = waiting_in(thread)
        self.name = found[0] if found else None
        token = (found, progress)
        if found is None or token != self._token:
            self._since = now
        self._token = token
        self.seconds = now - self._since


def waiting_in(thread: int) -> tuple[str, int] | None:
    """The collective or message that a thread waits for, and the identity of the waiting frame; None where it does something else.

    It waits where nothing but Horovod, MPI, a lock and ``comm`` is on top of its stack: rank 0 at work in ``World.main`` does not. Some of
    Horovod's collectives are autograd functions, so that frames of torch's may lie between. And it waits in ``comm.channel``'s loops,
    whatever they ask between two looks.
    """
    frame = sys._current_frames().get(thread)
    found: tuple[str, int] | None = None
    only_waits = True  # between this frame and the top, or the last loop that waits
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        only_waits |= module == _CHANNEL and frame.f_code.co_name in _WAITS
        if only_waits and module.startswith("horovod_jobs.comm."):
            values = frame.f_locals
            name = values.get("name", getattr(values.get("self"), "name", None))
            if isinstance(name, str):
                found = (name, id(frame))
            elif found is None:
                found = (f"{module.rpartition('.')[2]}.{frame.f_code.co_name}", id(frame))
        else:
            only_waits &= module.startswith(("horovod.", "mpi4py", "torch.autograd.", "threading"))
        frame = frame.f_back
    return found


class Others:
    """The signs of life of all other ranks, and when each was last seen to change, on this rank's clock."""

    def __init__(self, world: Place, directory: Path, servers: Sequence[int] = ()) -> None:
        self._world, self._directory, self._servers = world, directory, servers
        self._signs: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}

    @property
    def ranks(self) -> list[int]:
        """All others; those of the world change where it goes on without ranks that die."""
        return [*(rank for rank in range(self._world.size) if rank != self._world.rank), *self._servers]

    def forget(self) -> None:
        self._changed.clear()

    def look(self, now: float) -> None:
        for rank in self.ranks:
            sign = read_sign(self._directory / f"rank-{rank}.json")
            if rank not in self._changed or (sign or {}).get("beat") != self._signs.get(rank, {}).get("beat"):
                self._changed[rank] = now
            if sign is not None:
                self._signs[rank] = sign

    def silent(self, now: float, *, limit_s: float | None) -> list[int]:
        """Ranks that have not changed for ``limit_s``."""
        if limit_s is None:
            return []
        seen = [
            rank for rank in self.ranks if rank in self._changed and (rank in self._signs or rank < self._world.size)
        ]
        return [rank for rank in seen if now - self._changed[rank] > limit_s]

    def ended(self) -> list[int]:
        """Ranks that have said that they have ended."""
        return [rank for rank in self.ranks if self._signs.get(rank, {}).get("ended")]

    def at_work(self) -> list[int]:
        """Ranks that wait for nobody."""
        return [rank for rank in self.ranks if rank in self._signs and not self._signs[rank]["waiting_in"]]

    def describe(self, rank: int) -> str:
        sign = self._signs.get(rank)
        return f"rank {rank} (never seen)" if sign is None else f"rank {rank} (host {sign['host']}, pid {sign['pid']})"

    def doing(self) -> str:
        """What each of the other ranks is at."""
        told = []
        for rank in self.ranks:
            sign = self._signs.get(rank)
            if sign is None:
                continue
            at = (
                f"waiting in {sign['waiting_in']!r}" if sign["waiting_in"] else f"at work ({sign['doing'] or 'set-up'})"
            )
            told.append(f"{self.describe(rank)} {at}")
        return ", ".join(told) or "unknown"


def read_sign(path: Path) -> dict[str, Any] | None:
    """A rank's last sign of life; None where there is none or it is damaged."""
    try:
        sign = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return sign if isinstance(sign, dict) else None
