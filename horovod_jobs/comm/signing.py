"""Requests that both sides sign: HMAC-SHA256 over a key of one job (RFC 2104), and a number that is taken once.

A message is authenticated and cannot be altered or sent again. It is not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import secrets
import threading
from dataclasses import dataclass

KEY_BYTES = 32
HEADER = "Horovod-Jobs-Signature"
_REQUEST = re.compile(r"([A-Za-z0-9_-]{1,64}):([0-9]{1,18}):([0-9a-f]{64})")
_WINDOW = 4096  # Threads of a member overtake each other, though never by so many requests.


def new_key() -> bytes:
    """A key for one job."""
    return secrets.token_bytes(KEY_BYTES)


@dataclass(frozen=True)
class Stamp:
    """Who sends a request, and its number among those that this sender ever sends."""

    member: str
    number: int


def _mac(key: bytes, *parts: bytes) -> str:
    # Each part is preceded by its length, so that no two lists of parts give the same bytes.
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def _request_mac(key: bytes, stamp: Stamp, method: str, path: str, body: bytes) -> str:
    sender = (stamp.member.encode(), str(stamp.number).encode())
    return _mac(key, b"request", *sender, method.encode(), path.encode(), hashlib.sha256(body).digest())


def sign_request(key: bytes, stamp: Stamp, *, method: str, path: str, body: bytes) -> str:
    """The header of a request."""
    return f"{stamp.member}:{stamp.number}:{_request_mac(key, stamp, method, path, body)}"


def sign_answer(key: bytes, stamp: Stamp, *, status: int, body: bytes) -> str:
    """The header of the answer to the request with this stamp."""
    sender = (stamp.member.encode(), str(stamp.number).encode())
    return _mac(key, b"answer", *sender, str(status).encode(), hashlib.sha256(body).digest())


def is_answer(key: bytes, stamp: Stamp, header: str, *, status: int, body: bytes) -> bool:
    """Whether this is the answer of one who knows the key, to this very request."""
    return hmac.compare_digest(header.encode(), sign_answer(key, stamp, status=status, body=body).encode())


class Numbers:
    """Gives a sender its numbers. A process that is replaced by itself goes on from ``last``."""

    def __init__(self, last: int = 0) -> None:
        self.last = last
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            self.last += 1
            return self.last


class Guard:
    """Checks requests on the receiving side, and remembers which numbers were used."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._used: dict[str, tuple[int, set[int]]] = {}  # member -> all up to here are refused; used ones above
        self._lock = threading.Lock()

    def expect(self, member: str) -> None:
        """There is this sender; nobody else is listened to."""
        with self._lock:
            self._used.setdefault(member, (0, set()))

    def glance(self, header: str | None) -> tuple[Stamp, str] | str:
        """What a request says of itself and its signature, or why it is refused whatever its body. Nothing is proved yet."""
        if not header:
            return "it is not signed"
        parts = _REQUEST.fullmatch(header)
        if parts is None:
            return "its signature cannot be read"
        stamp = Stamp(parts[1], int(parts[2]))
        with self._lock:
            if stamp.member not in self._used:
                return "it is of nobody in this job"
            return (stamp, parts[3]) if self._is_new(stamp) else "it was sent before"

    def check(self, header: str | None, *, method: str, path: str, body: bytes) -> Stamp | str:
        """The sender's stamp, or why the request is refused."""
        read = self.glance(header)
        if isinstance(read, str):
            return read
        stamp, signature = read
        expected = _request_mac(self._key, stamp, method, path, body)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            return "its signature is wrong"
        return stamp if self._first_time(stamp) else "it was sent before"

    def _is_new(self, stamp: Stamp) -> bool:
        floor, used = self._used[stamp.member]
        return stamp.number > floor and stamp.number not in used

    def _first_time(self, stamp: Stamp) -> bool:
        with self._lock:
            if not self._is_new(stamp):
                return False
            floor, used = self._used[stamp.member]
            used.add(stamp.number)
            if len(used) > _WINDOW:
                floor = sorted(used)[len(used) // 2]
                used = set(itertools.filterfalse(floor.__ge__, used))
            self._used[stamp.member] = (floor, used)
            return True
