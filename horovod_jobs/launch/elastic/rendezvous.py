"""Where an elastic job's ranks meet: a small HTTP server that answers nobody who does not know the job's key.

Every request is signed (``comm.signing``), and so is every answer. Bodies are JSON, or Horovod's own small values, which are passed
on as bytes and looked into by nobody here. Horovod's own server takes anybody's PUT and unpickles it (CVE-2024-10190).

A request must be whole within two seconds. What cannot be a member's by its first lines is refused before its body is read.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any, cast

from horovod_jobs.comm.signing import HEADER, Guard, sign_answer
from horovod_jobs.comm.strangers import WaryHandler, WaryServer

_BODY_BYTES = 64 * 1024
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


class _Server(WaryServer):
    rendezvous: Rendezvous

    def cut_off(self, address: str) -> None:
        self.rendezvous.refused(address, "request refused: too many others are open that have not shown who they are")


class _Handler(WaryHandler):
    def _take(self) -> None:
        server, header = cast(_Server, self.server), self.headers.get(HEADER)
        rendezvous = server.rendezvous
        if (length := self.length(at_most=_BODY_BYTES)) is None:
            return
        early = rendezvous.guard.glance(header)
        if isinstance(early, str):
            self.refuse(403, early)
            return
        body = self.reader.read(length)
        stamp = rendezvous.guard.check(header, method=self.command, path=self.path, body=body)
        if isinstance(stamp, str):
            self.refuse(403, stamp)
            return
        server.strangers.leave(self.connection)
        status, told = rendezvous.answer(stamp.member, self.command, self.path, body)
        self.send(status, told, **{HEADER: sign_answer(rendezvous.key, stamp, status=status, body=told)})

    def note(self, text: str) -> None:
        cast(_Server, self.server).rendezvous.refused(self.client_address[0], text)

    do_GET = do_PUT = do_DELETE = do_POST = _take  # noqa: N815
