"""A rank of an elastic job, as its driver knows it: it asks for its place in the next world, says that it lives, and tells how a
world ended (docs/elastic.md).

The driver hands a ticket to the standard input of the process. The job's key is in it and nowhere else: not on a command line, not
in the environment, not in a file.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from horovod_jobs.comm.signing import HEADER, Numbers, Stamp, is_answer, sign_request
from horovod_jobs.errors import WorldError

VARIABLE = "HOROVOD_JOBS_TICKET"  # "stdin", or the file descriptor that this process handed to itself
_JOIN_PAUSE_S = 0.2
_GRACE_S = 60.0
_CUT_OFF = WorldError.exit_code


@dataclass(frozen=True)
class Ticket:
    """What a member must know to reach its driver."""

    member: str
    key: str = field(repr=False)  # hexadecimal
    address: str
    port: int
    host: str  # as the driver calls it
    interface: str  # of the ranks' connections; empty: the one that leads to the driver
    beat_s: float
    lease_s: float
    gloo_timeout_s: int
    numbers: int = 0  # requests that this member has already sent
    environment: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Place:
    """A member's place in a world."""

    generation: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


@dataclass
class Kept:
    """A commit: bytes that this process keeps over the end of a world."""

    identity: str
    step: int
    data: bytes


class Refused(Exception):  # noqa: N818
    """The driver answered, and said no."""


class Client:
    """Signed requests to the driver, one connection each. Threads may share it."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.numbers = ticket, Numbers(ticket.numbers)
        self._key = bytes.fromhex(ticket.key)

    def call(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError: nobody answers in time, or one who does not know the job's key.
        """
        import http.client  # Late: most processes that import this module are no members.

        ticket, stamp = self.ticket, Stamp(self.ticket.member, self.numbers.take())
        connection = http.client.HTTPConnection(ticket.address, ticket.port, timeout=timeout_s)
        try:
            signature = sign_request(self._key, stamp, method=method, path=path, body=body)
            connection.request(method, path, body=body, headers={HEADER: signature})
            answer = connection.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"the driver's answer cannot be read ({error!r})") from error
        finally:
            connection.close()
        if not is_answer(self._key, stamp, answer.headers.get(HEADER, ""), status=answer.status, body=data):
            raise OSError("the answer does not come from this job's driver")
        return answer.status, data

    def ask(self, path: str, *, timeout_s: float, **values: Any) -> dict[str, Any]:
        """A JSON answer.

        Raises:
            OSError: as ``call``.
            Refused: the driver does not know this member, or the job has ended.
        """
        status, data = self.call("POST", path, json.dumps(values).encode(), timeout_s=timeout_s)
        if status != 200:
            raise Refused(data.decode(errors="replace"))
        told: dict[str, Any] = json.loads(data)
        return told


class Member:
    """This process in an elastic job. ``commits`` outlive a world; ``place`` is the one in the world that is joined."""

    def __init__(self, ticket: Ticket, *, commits: dict[str, Kept] | None = None) -> None:
        self.ticket, self.client = ticket, Client(ticket)
        self.commits: dict[str, Kept] = commits or {}
        self.place: Place | None = None
        self._asked: Callable[[int], None] = lambda code: None
        self._alone = threading.Event()  # the driver has ended

    def start(self, *, asked: Callable[[int], None]) -> None:
        """Begin to say that this member lives. ``asked`` is told the code of a stop, or 1 where the world is to form anew."""
        self._asked = asked
        threading.Thread(target=self._beat, name="elastic.beat", daemon=True).start()
        threading.Thread(target=self._watch_driver, name="elastic.driver", daemon=True).start()

    def join(self) -> Place | None:
        """Wait for a place in the next world; None where there is none for this member any more."""
        generation = self.place.generation if self.place else -1
        while not self._alone.is_set():
            try:
                told = self.client.ask("/join", timeout_s=self.ticket.lease_s, generation=generation)
            except Refused:
                return None
            except OSError:
                time.sleep(_JOIN_PAUSE_S)  # The lease says when to give up.
                continue
            if told.get("leave"):
                return None
            if "place" in told:
                self.place = Place(**{name: int(told["place"][name]) for name in Place.__dataclass_fields__})
                return self.place
        return None

    def report(self, outcome: str, *, code: int, text: str = "", signalled: bool = False) -> bool:
        """Tell how this member's world ended: done, failed, lost or stopped. Whether it is to join the next one."""
        generation = self.place.generation if self.place else -1
        values = {"outcome": outcome, "code": code, "text": text[:500], "signalled": signalled}
        deadline = time.monotonic() + self.ticket.lease_s
        while time.monotonic() < deadline and not self._alone.is_set():
            try:
                told = self.client.ask("/report", timeout_s=self.ticket.lease_s, generation=generation, **values)
                return bool(told.get("go_on"))
            except Refused:
                return False
            except OSError:
                time.sleep(_JOIN_PAUSE_S)
        return False

    def exec_again(self) -> NoReturn:
        """Replace this process by itself: Horovod cannot start again after a start that failed. The commits go along in memory."""
        kept = [[one.identity, one.step, len(one.data)] for one in self.commits.values()]
        ticket = {**asdict(self.ticket), "numbers": self.client.numbers.last + 1000}  # What is under way is counted in.
        head = json.dumps({"ticket": ticket, "commits": kept}).encode() + b"\n"
        descriptor = os.memfd_create("horovod-jobs-elastic", 0) if hasattr(os, "memfd_create") else -1
        if descriptor < 0:
            self.end(_CUT_OFF)  # The driver starts another process, without these commits.
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(head)
            for one in self.commits.values():
                stream.write(one.data)
        os.set_inheritable(descriptor, True)
        environment = {**os.environ, VARIABLE: str(descriptor)}
        for name in ("HOROVOD_RANK", "HOROVOD_GLOO_RENDEZVOUS_ADDR"):  # Of the world that did not come about.
            environment.pop(name, None)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", "horovod_jobs", *sys.argv[1:]], environment)

    def end(self, code: int) -> NoReturn:
        """End this process at once: nobody waits for it."""
        sys.stderr.flush()
        os._exit(code)

    def _beat(self) -> None:
        lease_s, renewed = self.ticket.lease_s, time.monotonic()
        while True:
            # From the moment of asking: the driver has heard it later, so it is certain of this rank's end after the same time.
            asked = time.monotonic()
            left_s = renewed + lease_s - asked
            if left_s <= 0:
                sys.stderr.write(f"{self.ticket.member}: no answer of the driver for {lease_s:g} s; this rank ends\n")
                self.end(_CUT_OFF)
            try:
                told = self.client.ask("/beat", timeout_s=min(lease_s / 3, left_s))
                renewed = asked
                if code := int(told.get("stop", 0)):
                    self._asked(code)
            except Refused:
                self.end(_CUT_OFF)
            except OSError:
                pass  # Until the lease has run out.
            time.sleep(self.ticket.beat_s)

    def _watch_driver(self) -> None:
        # The other end of standard input is the driver's: it closes when the driver ends, whatever ended it.
        while os.read(0, 4096):
            pass
        self._alone.set()
        self._asked(1)
        time.sleep(_GRACE_S)
        self.end(_CUT_OFF)


_member: Member | None = None


def current() -> Member | None:
    """This process as a member of an elastic job, or None."""
    return _member


def take_ticket() -> Member | None:
    """Read the ticket, where a driver started this process. To be called before anything reads the environment.

    Raises:
        WorldError: there is no ticket where one should be.
    """
    global _member
    source = os.environ.pop(VARIABLE, "")
    if not source:
        return None
    try:
        if source == "stdin":
            _member = Member(read_ticket(_line(0)))
        else:
            with os.fdopen(int(source), "rb") as stream:
                stream.seek(0)
                told = json.loads(stream.readline())
                kept = [Kept(identity, step, stream.read(size)) for identity, step, size in told["commits"]]
            _member = Member(Ticket(**told["ticket"]), commits={one.identity: one for one in kept})
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise WorldError(
            f"{VARIABLE}={source} and no ticket is there ({type(error).__name__}); ranks of an elastic job are started by "
            "launch=local strategy=elastic, not by hand"
        ) from None  # The ticket holds the key: no part of it may reach a traceback.
    os.environ.update(_member.ticket.environment)
    return _member


def read_ticket(line: bytes) -> Ticket:
    """A ticket from its JSON line."""
    return Ticket(**json.loads(line))


def _line(descriptor: int) -> bytes:
    # Byte by byte: what follows the line belongs to _watch_driver.
    data = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        data += byte
    return bytes(data)
