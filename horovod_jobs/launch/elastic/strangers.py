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

PER_ADDRESS = 128
TOTAL = 512


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
