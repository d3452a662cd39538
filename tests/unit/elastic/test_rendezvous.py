"""The rendezvous over real sockets: members get through, by themselves and by Horovod's plain HTTP; nobody else does."""

from __future__ import annotations

import http.client
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from horovod_jobs.comm.member import Client, Place, Refused, Ticket
from horovod_jobs.comm.proxy import StoreProxy
from horovod_jobs.comm.signing import HEADER, Stamp, new_key, sign_request
from horovod_jobs.launch.elastic.rendezvous import Rendezvous, Store

KEY = new_key()
PLACE = Place(4, 1, 3, 0, 1, 1, 2)


class Served:
    """A server, what it was asked and what it refused."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.refused: list[tuple[str, str]] = []
        self.server = Rendezvous(
            "127.0.0.1",
            KEY,
            serve=self.serve,
            refused=lambda *told: self.refused.append(told),
            store=Store(patience_s=0.02),
        )

    def serve(self, member: str, path: str, values: dict[str, Any]) -> dict[str, Any] | None:
        self.asked.append((member, path, values))
        return {"seen": values} if member == "member-1" else None

    def client(self, *, key: bytes = KEY, member: str = "member-1") -> Client:
        return Client(ticket(self.server.port, key=key, member=member))

    def send(self, method: str, path: str, body: bytes = b"", *, header: str | None = None) -> tuple[int, bytes]:
        """As anybody can."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=5)
        try:
            connection.request(method, path, body=body, headers={HEADER: header} if header is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def ticket(port: int, *, key: bytes = KEY, member: str = "member-1") -> Ticket:
    return Ticket(member, key.hex(), "127.0.0.1", port, "localhost", "lo", 0.1, 2.0, 10)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    made.server.start()
    made.server.expect("member-1")
    made.server.expect("member-9")  # one that has been
    made.server.store.begin(4)
    yield made
    made.server.close()


def test_a_member_is_answered(served: Served) -> None:
    assert served.client().ask("/beat", timeout_s=5, generation=3) == {"seen": {"generation": 3}}
    assert served.asked == [("member-1", "/beat", {"generation": 3})]
    assert served.refused == []


def test_one_who_is_no_member_any_more_is_told_so(served: Served) -> None:
    with pytest.raises(Refused, match="not a member"):
        served.client(member="member-9").ask("/beat", timeout_s=5)


class Bomb:
    """What CVE-2024-10190 sends: unpickling it runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE", "POST"])
@pytest.mark.parametrize("path", ["/store/4/global_/0", "/worker_addresses/localhost", "/join", "/"])
def test_a_stranger_is_refused_whatever_he_sends(served: Served, method: str, path: str) -> None:
    body = pickle.dumps(Bomb())
    wrong = sign_request(new_key(), Stamp("member-1", 1), method=method, path=path, body=body)
    for header in (None, "", "member-1:1:" + "0" * 64, wrong):
        assert served.send(method, path, body, header=header) == (403, b"")
    assert served.asked == []
    assert [peer for peer, _ in served.refused] == ["127.0.0.1"] * 4
    assert "not signed" in served.refused[0][1]
    assert "signature is wrong" in served.refused[3][1]
    assert served.server.store._values == {}


def test_a_recorded_request_is_not_taken_again(served: Served) -> None:
    path, body = "/store/4/global_/0", b"address"
    header = sign_request(KEY, Stamp("member-1", 9), method="PUT", path=path, body=body)
    assert served.send("PUT", path, body, header=header)[0] == 200
    assert served.send("PUT", path, body, header=header)[0] == 403
    assert served.refused == [("127.0.0.1", "PUT refused: it was sent before")]


def test_a_pickle_of_a_member_is_bytes_in_the_store_and_no_json(served: Served) -> None:
    client, body = served.client(), pickle.dumps(Bomb())
    assert client.call("PUT", "/store/4/global_/0", body, timeout_s=5)[0] == 200
    assert client.call("GET", "/store/4/global_/0", timeout_s=5) == (200, body)
    assert client.call("POST", "/join", body, timeout_s=5)[0] == 400
    assert client.call("POST", "/join", b"[1]", timeout_s=5)[0] == 400
    assert served.asked == []


@pytest.mark.parametrize(
    "path", ["/store/4/../0", "/store/4/a/b/c", "/store/x/a/b", "/store/4/a/" + "k" * 65, "/etc/passwd"]
)
def test_other_paths_are_nothing(served: Served, path: str) -> None:
    assert served.client().call("GET", path, timeout_s=5)[0] == 404


def test_a_large_body_is_not_read(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as peer:
        peer.sendall(b"PUT /store/4/a/0 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in peer.recv(200)
    assert "99999999999" in served.refused[0][1]


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "٣"])
def test_a_length_that_is_no_number_is_refused(served: Served, length: str) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as peer:
        peer.sendall(f"PUT /a HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b" 413 " in peer.recv(200)


def test_rubbish_is_no_news(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    for said in (b"", b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"PUT /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"):
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as peer:
            peer.sendall(said)
    assert served.client().ask("/beat", timeout_s=5) == {"seen": {}}
    assert "Traceback" not in capfd.readouterr().err


def test_it_listens_on_the_job_s_interface_only(served: Served) -> None:
    assert served.server._server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", served.server.port), timeout=2).close()


def test_an_answer_of_one_who_does_not_know_the_key_is_not_believed(served: Served) -> None:
    other = Rendezvous("127.0.0.1", new_key(), serve=lambda *_: {}, refused=lambda *_: None)
    other.start()
    try:
        with pytest.raises(OSError, match="does not come from this job's driver"):
            Client(ticket(other.port)).ask("/beat", timeout_s=5)
    finally:
        other.close()


def test_a_generation_s_values_go_with_it() -> None:
    store = Store(patience_s=0.02)
    assert store.answer("GET", 0, "a", "0", b"") == (410, b"")
    store.begin(0)
    assert store.answer("GET", 0, "a", "0", b"") == (404, b"")
    assert store.answer("PUT", 0, "a", "0", b"v") == (200, b"")
    assert store.answer("GET", 0, "a", "0", b"") == (200, b"v")
    assert store.answer("DELETE", 0, "a", "0", b"") == (200, b"")
    store.begin(1)
    assert store.answer("GET", 0, "a", "0", b"") == (410, b"")
    assert store.answer("PUT", 0, "a", "0", b"v") == (410, b"")
    assert store.answer("GET", 1, "a", "0", b"") == (404, b"")


def test_the_answer_waits_for_a_value_and_not_for_a_world_that_is_over() -> None:
    store = Store(patience_s=10)
    store.begin(0)
    told: list[tuple[int, bytes]] = []
    for event in (lambda: store.answer("PUT", 0, "a", "0", b"v"), lambda: store.begin(1)):
        key = str(len(told))
        waiting = threading.Thread(target=lambda key=key: told.append(store.answer("GET", 0, "a", key, b"")))
        waiting.start()
        event()
        waiting.join(timeout=5)
        assert not waiting.is_alive()
    assert told == [(200, b"v"), (410, b"")]


# --- Horovod's side -----------------------------------------------------------------------------------------------------


@contextmanager
def proxy(served: Served) -> Iterator[StoreProxy]:
    made = StoreProxy(served.client(), timeout_s=5)
    made.place = PLACE
    try:
        yield made
    finally:
        made.close()


def as_horovod(environment: dict[str, str], method: str, key: str, body: bytes = b"") -> tuple[int, bytes]:
    """``http://ADDR:PORT/scope/key``, the host up to the first slash, the port after its colon: as Horovod's HTTPRequest.hpp reads it."""
    url = f"{environment['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{environment['HOROVOD_GLOO_RENDEZVOUS_PORT']}/{key}"
    host, _, path = url.partition("/")
    connection = http.client.HTTPConnection(*host.split(":"), timeout=5)  # type: ignore[arg-type]
    try:
        connection.request(method, f"/{path}", body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_horovod_s_requests_are_signed_and_passed_on(served: Served) -> None:
    with proxy(served) as made:
        environment = made.environment()
        assert as_horovod(environment, "GET", "global_/1")[0] == 404
        assert as_horovod(environment, "PUT", "global_/1", b"10.0.0.1:77")[0] == 200
        assert as_horovod(environment, "GET", "global_/1") == (200, b"10.0.0.1:77")
        assert served.server.store._values == {("global_", "1"): b"10.0.0.1:77"}
        made.place = Place(3, 0, 1, 0, 1, 0, 1)
        assert as_horovod(environment, "GET", "global_/1")[0] == 410, "a generation that is over"
    assert served.refused == []


def test_horovod_that_starts_again_is_told_its_place(served: Served) -> None:
    with proxy(served) as made:
        assert as_horovod(made.environment(), "GET", "rank_and_size/localhost:0") == (200, b"1,3,0,1,1,2")


def test_nobody_else_on_this_host_gets_through_the_proxy(served: Served) -> None:
    with proxy(served) as made:
        address, _, secret = made.environment()["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")
        assert len(secret) >= 32
        for guess in ("x" * len(secret), "", secret[:-1]):
            assert as_horovod({"HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}/{guess}", "HOROVOD_GLOO_RENDEZVOUS_PORT": "0"},
                              "PUT", "global_/1", b"evil")[0] == 403  # fmt: skip
    assert served.server.store._values == {}


def test_the_proxy_does_not_wait_for_the_body_of_a_stranger(served: Served) -> None:
    with proxy(served) as made:
        address, port = made._server.server_address[:2]
        with socket.create_connection((str(address), port), timeout=5) as peer:
            peer.sendall(b"PUT /guess:0/global_/1 HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
            assert b" 403 " in peer.recv(200)


def test_a_driver_that_is_gone_is_an_error_for_horovod(served: Served) -> None:
    with proxy(served) as made:
        served.server._server.socket.close()
        made.client = Client(ticket(1))
        assert as_horovod(made.environment(), "GET", "global_/1")[0] == 502


def test_a_ticket_does_not_show_its_key() -> None:
    made = ticket(1)
    assert made.key not in repr(made)
    assert json.loads(json.dumps(vars(made)))["key"] == made.key
