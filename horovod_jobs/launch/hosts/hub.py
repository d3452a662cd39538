"""The launcher's side of a Gloo world over hosts: one ssh a host, at whose other end ``station`` keeps that host's ranks."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from horovod_jobs import early
from horovod_jobs.errors import SetupError, WorldError
from horovod_jobs.interrupt import tell_stopping
from horovod_jobs.launch.hosts import station
from horovod_jobs.launch.hosts.checks import BOOTSTRAP
from horovod_jobs.launch.in_rank import code_of_all

_OTHERS_S = 3.0  # after a rank has failed: time for the others to end by themselves
_INSIST_S = 5.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Station:
    """A host's part of the world."""

    name: str
    reach: Sequence[str]  # the command that runs Python there
    argv: Sequence[str]  # of every rank
    cwd: str
    env: Mapping[str, str]  # what the ranks get of the launcher's environment
    ranks: Sequence[Mapping[str, str]]  # each rank's own variables
    here: bool = False  # this very host, reached without ssh


@dataclass
class _Host:
    station: Station
    process: subprocess.Popen[str]
    waiting: set[int] = field(default_factory=set)  # ranks that have not ended
    listener: threading.Thread | None = None


def run_stations(stations: Sequence[Station], *, grace_s: float, keepalive_s: float) -> int:
    """Run every rank, pass signals to all of them, and give the job's exit code.

    A host that hears nothing from here for four times ``keepalive_s`` ends its ranks: it has been cut off.

    The code is what the ranks have told (``in_rank.code_of_all``), or else that of the first rank that failed; 9 where a signal ended it
    or its host was lost.

    Raises:
        SetupError: a host cannot start the ranks.
    """
    hub = _Hub(stations, grace_s=grace_s, keepalive_s=keepalive_s)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, hub.note) for number in numbers}
    try:
        return hub.run()
    finally:
        hub.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Hub:
    def __init__(self, stations: Sequence[Station], *, grace_s: float, keepalive_s: float) -> None:
        self._grace_s, self._keepalive_s = grace_s, keepalive_s
        self._next_sign = 0.0
        self._reports: queue.Queue[tuple[_Host, dict[str, Any] | None]] = queue.Queue()
        self._signals: list[int] = []
        self.asked = 0  # the first signal
        self._deadline: float | None = None  # when the ranks are made to end
        self._insisted = False
        self._told: dict[int, int] = {}
        self._failed: int | None = None  # code of the first rank that failed
        self._ended_by_signal = ""
        self._lost: str | None = None
        self._refused: str | None = None
        self._hosts = [self._reach(one) for one in stations]

    def _reach(self, one: Station) -> _Host:
        # What a rank of this host is to know of the environment is in the order; nothing else is handed on.
        words = [*one.reach, "-c", BOOTSTRAP if one.here else shlex.quote(BOOTSTRAP)]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=dict(one.env) if one.here else None,
        )  # fmt: skip
        host = _Host(one, process, {int(variables["HOROVOD_RANK"]) for variables in one.ranks})
        order = {
            "argv": list(one.argv),
            "cwd": one.cwd,
            "env": dict(one.env),
            "ranks": [dict(entry) for entry in one.ranks],
            "lease_s": 4 * self._keepalive_s,
        }
        program = Path(station.__file__).read_text(encoding="utf-8")
        self._send(host, json.dumps(program), json.dumps(order))
        host.listener = threading.Thread(target=self._listen, args=(host,), daemon=True)
        host.listener.start()
        return host

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: remember it for the loop."""
        if number == signal.SIGINT and not (self.asked or self._signals):
            tell_stopping()
        self._signals.append(number)

    def run(self) -> int:
        while any(host.waiting for host in self._hosts):
            self._pass_signals()
            self._insist()
            if time.monotonic() >= self._next_sign:
                self._next_sign = time.monotonic() + self._keepalive_s
                self._tell_all({})  # A sign of life.
            with contextlib.suppress(queue.Empty):
                self._take(*self._reports.get(timeout=0.1))
        if self._refused:
            raise SetupError(self._refused)
        if told := code_of_all(code for _, code in sorted(self._told.items())):
            return told
        if self._failed is not None and self.asked:
            print(f"error: {early.said(self.asked)}", file=sys.stderr, flush=True)
            return 128 + self.asked
        if self._lost or (self._failed or 0) > 128:
            print(f"error: {self._lost or self._ended_by_signal}", file=sys.stderr, flush=True)
            return WorldError.exit_code
        return self._failed or 0

    def _listen(self, host: _Host) -> None:
        assert host.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in host.process.stdout:
                if line.startswith("{"):  # Anything else is a greeting of the host's shell.
                    self._reports.put((host, json.loads(line)))
        self._reports.put((host, None))

    def _take(self, host: _Host, report: dict[str, Any] | None) -> None:
        if report is None:
            if host.waiting:
                self._lost = self._lost or (
                    f"host {host.station.name} was lost while ranks {sorted(host.waiting)} ran there; see that it is up and "
                    "reachable by ssh; the same command goes on from the last checkpoint"
                )
                host.waiting.clear()
                self._end_soon(0.0)
        elif "text" in report:
            stream = sys.stdout if report["stream"] == 1 else sys.stderr
            stream.flush()
            with contextlib.suppress(BrokenPipeError):
                stream.buffer.write(report["text"].encode("latin-1"))
                stream.buffer.flush()
        elif "put" in report or "give_up" in report:
            for other in self._hosts:
                if other is not host:
                    self._send(other, json.dumps(report))
        elif "ended" in report:
            self._rank_ended(host, report)
        elif "failed" in report:
            self._refused = self._refused or (
                f"host {host.station.name} cannot start a rank ({report['failed']}); install the same environment there"
            )
            host.waiting.clear()
            self._end_soon(0.0)

    def _rank_ended(self, host: _Host, report: Mapping[str, Any]) -> None:
        host.waiting.discard(report["ended"])
        if report["told"] is not None:
            self._told[report["ended"]] = report["told"]
        if report["status"]:
            status = report["status"]
            if self._failed is None:
                self._failed = 128 - status if status < 0 else status
                self._ended_by_signal = (
                    f"rank {report['ended']} on {host.station.name} was ended by signal {-status}; see its log and the host's "
                    "(a lack of memory, say); the same command goes on from the last checkpoint"
                )
            self._end_soon(_OTHERS_S)

    def _end_soon(self, after_s: float) -> None:
        if self._deadline is None or not self.asked:
            self._deadline = min(self._deadline or float("inf"), time.monotonic() + after_s)

    def _pass_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            again, self.asked = self.asked != 0, self.asked or number
            self._deadline = time.monotonic() + (0.0 if again else self._grace_s)
            self._signal(number)

    def _insist(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._signal(signal.SIGKILL if self._insisted else signal.SIGTERM)
            self._insisted, self._deadline = True, time.monotonic() + _INSIST_S

    def _signal(self, number: int) -> None:
        self._tell_all({"signal": int(number)})

    def _tell_all(self, order: Mapping[str, Any]) -> None:
        for host in self._hosts:
            self._send(host, json.dumps(order))

    def _send(self, host: _Host, *lines: str) -> None:
        assert host.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # A host that has gone is noticed by its silence.
            host.process.stdin.write("".join(f"{line}\n" for line in lines))
            host.process.stdin.flush()

    def close(self) -> None:
        """End every station: its input ends, and with it the ranks that are left."""
        for host in self._hosts:
            with contextlib.suppress(OSError):
                assert host.process.stdin is not None
                host.process.stdin.close()
        deadline = time.monotonic() + 15
        for host in self._hosts:
            try:
                host.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(host.process.pid, signal.SIGKILL)
                host.process.wait()
            if host.listener is not None and host.process.stdout is not None:
                host.listener.join()
                host.process.stdout.close()
