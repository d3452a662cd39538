"""The ranks of one host of a Gloo world. Its text is sent to the host by ssh and run there: the standard library only.

Orders come in as lines of JSON, reports go out as lines of JSON, and ssh carries both: what Gloo's ranks have to find each other
is put into a store here, which answers this host's ranks on the loopback address only and is the same on every host because the
launcher passes each entry on. Nothing of it crosses the network in the clear, and nobody outside the hosts can read or write it.

When the input ends, because the launcher was killed or the host was cut off, the ranks are ended.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.server
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

Rank = tuple[int, "subprocess.Popen[bytes]", list[threading.Thread]]
_KILL_AFTER_S = 10.0
_LINE_S = 0.1
_LARGEST_BYTES = 1 << 20  # an address of a rank has a few hundred
_say_lock = threading.Lock()


def say(**report: Any) -> None:
    """One report to the launcher."""
    line = json.dumps(report) + "\n"
    with _say_lock, contextlib.suppress(OSError, ValueError):
        sys.stdout.write(line)
        sys.stdout.flush()


class Store:
    """What ranks tell each other. A scope is emptied when every key that was put into it has been given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, bytes]] = {}
        self._gone: dict[str, set[str]] = {}

    def get(self, scope: str, key: str) -> bytes | None:
        with self._lock:
            return self._values.get(scope, {}).get(key)

    def put(self, scope: str, key: str, value: bytes) -> None:
        with self._lock:
            self._values.setdefault(scope, {})[key] = value

    def give_up(self, scope: str, key: str) -> None:
        with self._lock:
            gone = self._gone.setdefault(scope, set())
            gone.add(key)
            if gone >= set(self._values.get(scope, {})):
                self._values.pop(scope, None)
                del self._gone[scope]


class Handler(http.server.BaseHTTPRequestHandler):
    """Horovod's side of the store: GET, PUT and DELETE of /scope/key."""

    store = Store()
    timeout = 10

    def _path(self) -> tuple[str, str] | None:
        parts = self.path.split("/")
        return (parts[1], parts[2]) if len(parts) == 3 else None

    def _reply(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The value, or 404 where there is none yet."""
        place = self._path()
        value = self.store.get(*place) if place else None
        self._reply(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        """Take the value, and tell the launcher."""
        place, length = self._path(), self.headers.get("Content-Length", "")
        if place is None or not length.isdigit() or int(length) > _LARGEST_BYTES:
            self._reply(400)
            return
        value = self.rfile.read(int(length))
        self.store.put(*place, value)
        say(put=[*place, base64.b64encode(value).decode()])
        self._reply(200)

    def do_DELETE(self) -> None:
        """A rank is done with its key."""
        place = self._path()
        if place is not None:
            self.store.give_up(*place)
            say(give_up=list(place))
        self._reply(200)

    def log_message(self, *arguments: Any) -> None:
        """The launcher's console is the job's."""


def _nothing(number: int, frame: Any) -> None:
    """A handler and not SIG_IGN, which ranks would inherit."""


def _end_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def relay(stream: IO[bytes], rank: int, number: int) -> None:
    """A rank's output in whole lines, so that those of two ranks do not mix. What is no line yet waits ``_LINE_S`` for its end."""
    begun = b""
    while True:
        if begun and not select.select([stream], [], [], _LINE_S)[0]:
            say(rank=rank, stream=number, text=begun.decode("latin-1"))
            begun = b""
        data = os.read(stream.fileno(), 65536)
        begun += data
        end = len(begun) if not data else begun.rfind(b"\n") + 1
        if end:
            say(rank=rank, stream=number, text=begun[:end].decode("latin-1"))
            begun = begun[end:]
        if not data:
            break
    stream.close()


def start_rank(order: Mapping[str, Any], variables: Mapping[str, str], directory: str, port: int) -> Rank:
    """A rank, and the threads that read what it prints."""
    env = {**os.environ, **order["env"], **variables, "HOROVOD_JOBS_LAUNCH_DIR": directory,
           "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)}  # fmt: skip
    process = subprocess.Popen(order["argv"], cwd=order["cwd"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True, preexec_fn=_end_with_parent)  # fmt: skip
    rank = int(variables["HOROVOD_RANK"])
    assert process.stdout is not None
    assert process.stderr is not None
    threads = [
        threading.Thread(target=relay, args=(stream, rank, number), daemon=True)
        for number, stream in ((1, process.stdout), (2, process.stderr))
    ]
    for thread in threads:
        thread.start()
    return rank, process, threads


def watch(rank: int, process: subprocess.Popen[bytes], threads: Sequence[threading.Thread], directory: str) -> None:
    """Report a rank's end: the code that it wrote down, or else its exit status."""
    status = process.wait()
    for thread in threads:
        thread.join(timeout=5)
    told = None
    with contextlib.suppress(OSError, ValueError), open(os.path.join(directory, f"exit-{rank:06d}")) as stream:
        told = int(stream.read())
    say(ended=rank, status=status, told=told)


def obey(ranks: Sequence[Rank], lease: Lease) -> None:
    """Take orders until the input ends, then end the ranks."""
    for line in sys.stdin:
        lease.renew()
        order = json.loads(line)
        if "put" in order:
            scope, key, value = order["put"]
            Handler.store.put(scope, key, base64.b64decode(value))
        elif "give_up" in order:
            Handler.store.give_up(*order["give_up"])
        elif "signal" in order:
            send(ranks, order["signal"], whole=order["signal"] == signal.SIGKILL)
    end(ranks)


def end(ranks: Sequence[Rank]) -> None:
    """Ask the ranks to end, then make them."""
    send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _KILL_AFTER_S
    while time.monotonic() < deadline and any(process.poll() is None for _, process, _ in ranks):
        time.sleep(0.1)
    send(ranks, signal.SIGKILL, whole=True)


class Lease:
    """The launcher's signs of life. Where none comes for ``seconds`` this host has been cut off: its ranks are ended."""

    def __init__(self, ranks: Sequence[Rank], seconds: float) -> None:
        self._ranks, self._seconds, self._heard = ranks, seconds, time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def renew(self) -> None:
        self._heard = time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() - self._heard < self._seconds:
            time.sleep(min(1.0, self._seconds / 4))
        end(self._ranks)
        os._exit(1)


def send(ranks: Sequence[Rank], number: int, *, whole: bool = False) -> None:
    """A signal to every rank; ``whole``: to what a rank has started as well."""
    for _, process, _ in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if whole:
                os.killpg(process.pid, number)
            elif process.poll() is None:
                os.kill(process.pid, number)


def main(order: Mapping[str, Any]) -> None:
    """Start the ranks and stay until they and the input have ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _nothing)  # The end of the input is what ends this process; ranks start with the default.
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        tempfile.TemporaryDirectory() as directory,
    ):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ranks: list[Rank] = []
        try:
            for variables in order["ranks"]:
                ranks.append(start_rank(order, variables, directory, server.server_address[1]))
        except OSError as error:
            say(failed=str(error))
        watchers = [threading.Thread(target=watch, args=(*one, directory)) for one in ranks]
        for watcher in watchers:
            watcher.start()
        obey(ranks, Lease(ranks, order["lease_s"]))
        for watcher in watchers:
            watcher.join()
        server.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
