"""Horovod's own store client speaks plain, unsigned HTTP. It is given a server in its own process, which signs and passes on.

That server listens on the loopback address and answers only below a path that this process alone knows: Horovod is told it as a part
of the address, in a variable that is set after the process has started and so is not in ``/proc/PID/environ``.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from typing import cast

from horovod_jobs.comm.member import Client, Place
from horovod_jobs.comm.strangers import WaryHandler, WaryServer

_LIMIT_BYTES = 1 << 20
_RANK_AND_SIZE = "rank_and_size"  # what Horovod asks when it starts again (HOROVOD_ELASTIC=1)


class StoreProxy:
    """Passes ``/<secret>:0/<scope>/<key>`` on to ``/store/<generation>/<scope>/<key>`` of the driver."""

    def __init__(self, client: Client, *, timeout_s: float) -> None:
        self.client, self.timeout_s = client, timeout_s
        self.place: Place | None = None
        self.secret = secrets.token_urlsafe(24)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="elastic.store", daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Where Horovod finds it. Horovod makes the URL ``http://ADDR:PORT/scope/key`` of the two."""
        port = self._server.server_address[1]
        return {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"127.0.0.1:{port}/{self.secret}",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": "0",
        }

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def knows(self, path: str) -> bool:
        """Whether a request is of this process."""
        head = path.lstrip("/").partition("/")[0]
        return hmac.compare_digest(head.encode(), f"{self.secret}:0".encode())

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body for a request of this process."""
        place, rest = self.place, path.lstrip("/").partition("/")[2]
        if place is None or not self.knows(path):
            return 403, b""
        if rest.startswith(f"{_RANK_AND_SIZE}/"):
            numbers = (place.rank, place.size, place.local_rank, place.local_size, place.cross_rank, place.cross_size)
            return 200, ",".join(map(str, numbers)).encode()
        try:
            return self.client.call(method, f"/store/{place.generation}/{rest}", body, timeout_s=self.timeout_s)
        except OSError:
            return 502, b""


class _Server(WaryServer):
    proxy: StoreProxy


class _Handler(WaryHandler):
    def _pass_on(self) -> None:
        server = cast(_Server, self.server)
        if not server.proxy.knows(self.path):
            self.refuse(403, "it is not of this process")
            return
        if (length := self.length(at_most=_LIMIT_BYTES)) is None:
            return
        body = self.reader.read(length)
        server.strangers.leave(self.connection)
        self.send(*server.proxy.answer(self.command, self.path, body))

    do_GET = do_PUT = do_DELETE = _pass_on  # noqa: N815
