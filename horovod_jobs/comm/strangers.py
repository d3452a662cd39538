"""Connections of peers that have not shown who they are: how much they may say, for how long, and how many of them there may be.

A stranger can be on a member's own host, and so have its address. Where there are too many connections none is therefore turned away
at the door: the one that has been silent about itself the longest is cut off. A member shows who it is within milliseconds.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

PER_ADDRESS = 128
TOTAL = 512
HEAD_BYTES = 8 * 1024
WHOLE_S = 2.0  # for a request, from the first byte to the last


class TooMuch(Exception):  # noqa: N818
    """A peer says more than it may."""


class Strangers:
    """The connections whose sender is not known yet, the oldest first."""

    def __init__(self, *, per_address: int = PER_ADDRESS, total: int = TOTAL) -> None:
        self._per_address, self._total = per_address, total
        self._peers: dict[socket.socket, str] = {}
        self._lock = threading.Lock()

    def enter(self, peer: socket.socket, address: str) -> str | None:
        """One more; gives the address of the one that was cut off for it, if one was."""
        with self._lock:
            self._peers[peer] = address
            count = Counter(self._peers.values())
            if count[address] > self._per_address:
                crowded = address
            elif len(self._peers) > self._total:
                crowded = count.most_common(1)[0][0]
            else:
                return None
            oldest = next(other for other, where in self._peers.items() if where == crowded)
            del self._peers[oldest]
            # Its own thread closes it, and only after ``leave``: this is no other connection of the same number.
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
            return crowded

    def leave(self, peer: socket.socket) -> None:
        """It has shown who it is, or has ended."""
        with self._lock:
            self._peers.pop(peer, None)


class Reader:
    """What a peer says, read like a file: all of it until a moment, and no more than a number of bytes in lines.

    A time limit for each ``recv`` would let a peer stay for as long as it sends a byte now and then.
    """

    def __init__(self, peer: socket.socket, *, within_s: float, head_bytes: int) -> None:
        self._peer, self._deadline, self._head_bytes = peer, time.monotonic() + within_s, head_bytes
        self._held = b""
        self.closed = False  # asked by http.server

    def _more(self) -> bool:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._peer.settimeout(left_s)
        data = self._peer.recv(8192)
        self._held += data
        return bool(data)

    def readline(self, limit: int = -1) -> bytes:
        """A line with its end, or what there is where the peer has ended.

        Raises:
            TimeoutError: it is not there in time.
            TooMuch: the lines together are too long.
        """
        while b"\n" not in self._held and len(self._held) <= self._head_bytes:
            if not self._more():
                break
        end = self._held.find(b"\n") + 1 or len(self._held)
        if end > self._head_bytes:
            raise TooMuch
        self._head_bytes -= end
        return self._take(end)

    def read(self, count: int) -> bytes:
        """So many bytes, or fewer where the peer has ended.

        Raises:
            TimeoutError: they are not there in time.
        """
        while len(self._held) < count and self._more():
            pass
        return self._take(count)

    def pass_over(self, count: int) -> None:
        """Read on until the peer has ended, and forget it: who closes with bytes unread takes back the answer it has sent."""
        with contextlib.suppress(OSError):
            while count > 0 and self._more():
                count -= len(self._take(len(self._held)))

    def _take(self, count: int) -> bytes:
        data, self._held = self._held[:count], self._held[count:]
        return data

    def close(self) -> None:
        """The socket is closed by its server."""
        self.closed = True


class WaryServer(ThreadingHTTPServer):
    """A server that strangers cannot hold up. Its handlers say with ``strangers.leave`` who has shown who it is."""

    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.strangers = Strangers()

    def cut_off(self, address: str) -> None:
        """Told the address whose oldest connection had to go."""

    def process_request(self, request: Any, client_address: Any) -> None:
        crowded = self.strangers.enter(request, client_address[0])
        if crowded is not None:
            self.cut_off(crowded)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.strangers.leave(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up in the middle is no news."""


class WaryHandler(BaseHTTPRequestHandler):
    """Reads a request within ``whole_s``."""

    server_version, sys_version = "horovod-jobs", ""
    whole_s = WHOLE_S

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = Reader(self.connection, within_s=self.whole_s, head_bytes=HEAD_BYTES)
        self.rfile = cast(Any, self.reader)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except TooMuch:
            self.command, self.requestline, self.request_version = "request", "", ""
            self.refuse(431, f"its first lines have more than {HEAD_BYTES} bytes")

    def length(self, *, at_most: int) -> int | None:
        """Of the body that is announced; None where it is no number, or too many bytes. That is answered with 413."""
        length = self.headers.get("Content-Length", "0")
        if (length.isascii() and length.isdigit()) and len(length) <= 9 and int(length) <= at_most:
            return int(length)
        self.refuse(413, f"its body has {length[:20]!r} bytes")
        return None

    def refuse(self, status: int, why: str) -> None:
        """Answer with a status alone, and end the connection."""
        self.note(f"{self.command} refused: {why}")
        self.send(status, b"")
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.reader.pass_over(1 << 16)

    def note(self, text: str) -> None:
        """Told what was refused."""

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """The answer; an underscore in a header's name stands for a hyphen."""
        self.connection.settimeout(self.whole_s)  # for all of the answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_error(self, format: str, *args: Any) -> None:
        if args and isinstance(args[0], TimeoutError):  # http.server's word for a request that was not whole in time
            self.note(f"request refused: it was not whole within {self.whole_s:g} s")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what matters is told by ``note``."""
