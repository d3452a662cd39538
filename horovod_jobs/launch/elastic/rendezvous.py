"""Where an elastic job's ranks meet: a small HTTP server that answers nobody who does not know the job's key.

Every request is signed (``comm.signing``), and so is every answer. Bodies are JSON, or Horovod's own small values, which are passed
on as bytes and looked into by nobody here. Horovod's own server takes anybody's PUT and unpickles it (CVE-2024-10190).

A request must be whole within two seconds. What cannot be a member's by its first lines is refused before its body is read.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from horovod_jobs.comm.signing import HEADER, Guard, sign_answer
from horovod_jobs.launch.elastic.strangers import Reader, Strangers, TooMuch

_BODY_BYTES = 64 * 1024
_HEAD_BYTES = 8 * 1024
_WHOLE_S = 2.0  # for a request, from the first byte to the last
_STORE = re.compile(r"/store/([0-9]{1,9})/([A-Za-z0-9_.-]{1,255})/([A-Za-z0-9_.:-]{1,64})")
Answer = tuple[int, bytes]


class Store:
    """What the ranks of one generation tell each other to find each other. An older generation's ranks are told that it is over.

    Horovod asks for a value every 10 ms until it is there. The answer is therefore held for ``patience_s``: many ranks would ask
    more often than a server can answer.
    """

    def __init__(self, *, patience_s: float = 0.5) -> None:
        self._patience_s = patience_s
        self._generation = -1
        self._values: dict[tuple[str, str], bytes] = {}
        self._changed = threading.Condition()

    def begin(self, generation: int) -> None:
        """Forget what was, and take values of this generation."""
        with self._changed:
            if generation != self._generation:
                self._generation, self._values = generation, {}
                self._changed.notify_all()

    def answer(self, method: str, generation: int, scope: str, key: str, body: bytes) -> Answer:
        """Status and body; 404 for a value that is not there yet, 410 for a generation that is over."""
        with self._changed:
            if method == "GET":
                self._changed.wait_for(
                    lambda: generation != self._generation or (scope, key) in self._values, timeout=self._patience_s
                )
            if generation != self._generation:
                return 410, b""
            if method == "PUT":
                self._values[scope, key] = body
                self._changed.notify_all()
            elif method == "GET":
                value = self._values.get((scope, key))
                return (404, b"") if value is None else (200, value)
            return 200, b""  # DELETE says that a rank has finished, which nobody waits for.


class Rendezvous:
    """The server. ``serve`` answers a POST of a member: (member, path, values) -> JSON values, or None where it is refused.

    Args:
        address: the job's interface; never all of them.
        key: of this job.
        serve: called from a thread of the request's own.
        refused: told the peer's address and why, for every request that is refused.
        store: of Horovod's values; a new one without it.
    """

    def __init__(
        self,
        address: str,
        key: bytes,
        *,
        serve: Callable[[str, str, dict[str, Any]], dict[str, Any] | None],
        refused: Callable[[str, str], None],
        store: Store | None = None,
    ) -> None:
        self.key, self.guard, self.store = key, Guard(key), store or Store()
        self.serve, self.refused = serve, refused
        self._server = _Server((address, 0), _Handler)
        self._server.rendezvous = self
        serve_forever = self._server.serve_forever
        self._thread = threading.Thread(target=serve_forever, args=(0.05,), name="elastic.rendezvous", daemon=True)

    @property
    def port(self) -> int:
        """The one that the system chose."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def expect(self, member: str) -> None:
        """From now on there may be requests of this member; those of others are refused before they are looked into."""
        self.guard.expect(member)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, member: str, method: str, path: str, body: bytes) -> Answer:
        """For a request whose signature is right."""
        if (found := _STORE.fullmatch(path)) and method in ("GET", "PUT", "DELETE"):
            return self.store.answer(method, int(found[1]), found[2], found[3], body)
        if method != "POST":
            return 404, b"no such place"
        try:
            values = json.loads(body)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            return 400, b"the body is not a JSON object"
        told = self.serve(member, path, values)
        return (
            (403, b"not a member of this job, or the job has ended")
            if told is None
            else (200, json.dumps(told).encode())
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = False
    rendezvous: Rendezvous

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.strangers = Strangers()

    def process_request(self, request: Any, client_address: Any) -> None:
        crowded = self.strangers.enter(request, client_address[0])
        if crowded is not None:
            self.rendezvous.refused(
                crowded, "request refused: too many others are open that have not shown who they are"
            )
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.strangers.leave(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "horovod-jobs", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = Reader(self.connection, within_s=_WHOLE_S, head_bytes=_HEAD_BYTES)
        self.rfile = cast(Any, self._reader)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except TooMuch:
            self.command, self.request_version = "request", ""
            self.requestline = ""
            self._refuse(431, f"its first lines have more than {_HEAD_BYTES} bytes")

    def _take(self) -> None:
        rendezvous, header = cast(_Server, self.server).rendezvous, self.headers.get(HEADER)
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 9 or int(length) > _BODY_BYTES:
            self._refuse(413, f"its body has {length[:20]!r} bytes")
            return
        early = rendezvous.guard.glance(header)
        if isinstance(early, str):
            self._refuse(403, early)
            return
        body = self._reader.read(int(length))
        stamp = rendezvous.guard.check(header, method=self.command, path=self.path, body=body)
        if isinstance(stamp, str):
            self._refuse(403, stamp)
            return
        cast(_Server, self.server).strangers.leave(self.connection)
        status, told = rendezvous.answer(stamp.member, self.command, self.path, body)
        self._send(status, told, sign_answer(rendezvous.key, stamp, status=status, body=told))

    def _refuse(self, status: int, why: str) -> None:
        self._note(f"{self.command} refused: {why}")
        self._send(status, b"", "")
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self._reader.pass_over(_BODY_BYTES)

    def _note(self, text: str) -> None:
        cast(_Server, self.server).rendezvous.refused(self.client_address[0], text)

    def _send(self, status: int, body: bytes, signature: str) -> None:
        self.connection.settimeout(_WHOLE_S)  # for all of the answer
        self.send_response(status)
        self.send_header(HEADER, signature)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_POST = _take  # noqa: N815

    def log_error(self, format: str, *args: Any) -> None:
        if args and isinstance(args[0], TimeoutError):  # http.server's word for a request that was not whole in time
            self._note(f"request refused: it was not whole within {_WHOLE_S:g} s")

    def log_message(self, format: str, *args: Any) -> None:
        """What matters is told by ``refused``."""
