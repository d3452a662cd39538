"""Strangers at the rendezvous: idle, slow, many or talkative, over real sockets. Members get through meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from horovod_jobs.comm.member import Client
from horovod_jobs.comm.signing import HEADER, Stamp, sign_request
from horovod_jobs.comm.strangers import Reader, Strangers, TooMuch, WaryHandler
from horovod_jobs.launch.elastic.rendezvous import Rendezvous
from tests.unit.elastic.test_rendezvous import KEY, Served, ticket

LEASE_S = 5.0  # a third of the default


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    made.server.start()
    made.server.expect("member-1")
    yield made
    made.server.close()


def dial(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.server.port), timeout=10)


def head(header: str, *, length: int = 10) -> bytes:
    return f"POST /beat HTTP/1.1\r\n{HEADER}: {header}\r\nContent-Length: {length}\r\n\r\n".encode()


def forged(member: str = "member-1", number: int = 1) -> str:
    """A header that looks like a member's: whether it is one shows only with the body."""
    return sign_request(bytes(32), Stamp(member, number), method="POST", path="/beat", body=b"")


def is_over(peer: socket.socket) -> bool:
    """Whether the server has ended this connection; what it said is read and forgotten."""
    peer.setblocking(False)
    try:
        while peer.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def test_idle_and_slow_strangers_of_a_member_s_own_address_do_not_make_it_miss_its_lease(served: Served) -> None:
    """200 that say nothing and 20 that send a byte now and then, half of them behind a header that could be a member's."""
    client, longest_s = Client(ticket(served.server.port)), 0.0
    with ExitStack() as stack:
        idle = [stack.enter_context(dial(served)) for _ in range(200)]
        slow = [stack.enter_context(dial(served)) for _ in range(20)]
        for peer in slow[::2]:
            peer.sendall(head(forged(), length=1000))
        waiting, begun, last = {*idle, *slow}, time.monotonic(), time.monotonic()
        while waiting:
            with suppress(OSError):  # A member asks again as well, for as long as its lease runs.
                assert client.ask("/beat", timeout_s=LEASE_S / 3) == {"seen": {}}
                longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
            assert time.monotonic() - begun < 20, f"{len(waiting)} strangers are still there"
            waiting = {peer for peer in waiting if not is_over(peer)}
            for peer in waiting.intersection(slow):
                try:
                    peer.send(b"x")
                except OSError:
                    waiting.discard(peer)
    longest_s = max(longest_s, time.monotonic() - last)
    assert longest_s < LEASE_S
    told = [why for _, why in served.refused]
    assert "request refused: too many others are open that have not shown who they are" in told
    assert "request refused: it was not whole within 2 s" in told


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (None, "it is not signed"),
        ("member-1", "its signature cannot be read"),
        (forged("member-77"), "it is of nobody in this job"),
    ],
    ids=["none", "rubbish", "nobody"],
)
def test_who_cannot_be_a_member_is_refused_before_its_body(served: Served, header: str | None, why: str) -> None:
    with dial(served) as peer:  # The body that is announced never comes.
        peer.sendall(head(header) if header else b"POST /beat HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        assert b" 403 " in peer.recv(200)
    assert served.refused == [("127.0.0.1", f"POST refused: {why}")]


def test_the_answer_to_a_refused_request_arrives_although_its_body_is_not_wanted(served: Served) -> None:
    for _ in range(20):
        with dial(served) as peer:
            peer.sendall(head("rubbish", length=60000) + b"x" * 60000)
            assert b" 403 " in peer.recv(200)


def test_a_long_head_is_not_read_on(served: Served) -> None:
    for said in (
        b"GET /" + b"x" * 9000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000,
        b"GET / HTTP/1.1\r\nA: " + b"b" * 9000,
    ):
        with dial(served) as peer:
            peer.sendall(said)
            assert b" 431 " in peer.recv(200)
    assert {why for _, why in served.refused} == {"request refused: its first lines have more than 8192 bytes"}


def test_a_slow_sender_has_one_time_limit_and_not_one_for_each_byte(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaryHandler, "whole_s", 0.3)
    with dial(served) as peer:
        peer.sendall(head(forged(), length=60000))
        begun = time.monotonic()
        while not is_over(peer):
            try:
                peer.send(b"x")
            except OSError:
                break
            assert time.monotonic() - begun < 8
            threading.Event().wait(0.01)
    assert served.refused == [("127.0.0.1", "request refused: it was not whole within 0.3 s")]


def test_a_member_s_question_may_be_held_for_longer_than_a_request_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not the one that is cut off for newcomers: it has shown who it is."""
    monkeypatch.setattr(WaryHandler, "whole_s", 0.2)
    asked, go_on = threading.Event(), threading.Event()

    def serve(member: str, path: str, values: dict[str, object]) -> dict[str, object]:
        asked.set()
        go_on.wait(10)
        return {"place": 1}

    server = Rendezvous("127.0.0.1", KEY, serve=serve, refused=lambda *told: None)
    server._server.strangers = Strangers(per_address=2, total=2)
    server.start()
    server.expect("member-1")
    told: list[object] = []
    thread = threading.Thread(target=lambda: told.append(Client(ticket(server.port)).ask("/join", timeout_s=10)))
    thread.start()
    try:
        assert asked.wait(10)
        with ExitStack() as stack:
            peers = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)) for _ in range(8)
            ]
            deadline = time.monotonic() + 10
            while not all(map(is_over, peers)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        go_on.set()
        thread.join(10)
    finally:
        go_on.set()
        server.close()
    assert told == [{"place": 1}]


def pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair()
    return stack.enter_context(here), stack.enter_context(there)


def test_the_oldest_of_the_address_with_too_many_is_cut_off_and_nobody_else() -> None:
    with ExitStack() as stack:
        ends = [pair(stack) for _ in range(6)]
        strangers = Strangers(per_address=2, total=4)
        assert [strangers.enter(ends[at][0], where) for at, where in enumerate("aab")] == [None] * 3
        assert strangers.enter(ends[3][0], "a") == "a"
        assert [is_over(there) for _, there in ends] == [True] + [False] * 5
        strangers.leave(ends[1][0])  # it has shown who it is
        assert strangers.enter(ends[4][0], "a") is None
        assert [is_over(there) for _, there in ends] == [True] + [False] * 5


def test_where_all_together_are_too_many_the_address_with_the_most_pays() -> None:
    with ExitStack() as stack:
        ends = [pair(stack) for _ in range(4)]
        strangers = Strangers(per_address=3, total=3)
        for at, where in enumerate("baa"):
            strangers.enter(ends[at][0], where)
        assert strangers.enter(ends[3][0], "c") == "a"
        assert [is_over(there) for _, there in ends] == [False, True, False, False]


def test_lines_and_bytes_are_read_as_they_come_and_no_more_than_may_be() -> None:
    with ExitStack() as stack:
        here, there = pair(stack)
        reader = Reader(here, within_s=5, head_bytes=12)
        there.sendall(b"one\r\n\r\nbody and more")
        assert (reader.readline(100), reader.readline(100), reader.read(4)) == (b"one\r\n", b"\r\n", b"body")
        there.sendall(b"\n")
        with pytest.raises(TooMuch):
            reader.readline()
        there.close()
        assert reader.read(100) == b" and more\n"
        assert reader.readline() == b""
