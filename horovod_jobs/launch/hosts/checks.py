"""Look at every host before a job starts there: in parallel, as a table with a row a host, and with one error if it cannot work."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.hosts import probe
from horovod_jobs.launch.hosts.judging import (
    COLUMNS,
    PACKAGE,
    PACKAGES,
    Answer,
    Finding,
    Wanted,
    judge,
    network_of,
    raise_if_bad,
)

# Reads the program from the first line of its input, so that nothing need be installed and nothing stands on a command line.
BOOTSTRAP = "import json,sys;exec(compile(json.loads(sys.stdin.readline()),'horovod_jobs','exec'))"
_PEER_TIMEOUT_S = 4.0
_LOG_COLUMNS = 1000  # In a log a row is a line; the table is as wide as its words.


@dataclass(frozen=True)
class Checked:
    """Hosts that can run the job."""

    here: frozenset[str]  # names of this very host
    first_is_here: bool
    interfaces: Mapping[str, str]  # host -> its interface towards the others
    networks: tuple[str, ...]  # subnets of these, without repeats; empty for a single host


class _Talk:
    """A probe on one host, asked in its own thread."""

    def __init__(self, name: str, *, command: Sequence[str], order: Mapping[str, Any], timeout_s: float) -> None:
        self.name, self.answer = name, Answer()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )  # fmt: skip
        except OSError as error:
            raise SetupError(f"{command[0]} cannot be started ({error}); install openssh-client") from error
        self._timer = threading.Timer(timeout_s, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        program = Path(probe.__file__).read_text(encoding="utf-8")
        self._send(json.dumps(program), json.dumps(order))

    def _send(self, *lines: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("".join(f"{line}\n" for line in lines))
            self._process.stdin.flush()
        except OSError:
            pass  # It has ended; the reader says why.

    def hear(self, stage: str) -> None:
        """Read an answer; call it on a thread."""
        assert self._process.stdout is not None
        line = "\n"
        while line and not line.startswith("{"):  # A host's shell may have a greeting.
            line = self._process.stdout.readline()
        if line.startswith("{"):
            setattr(self.answer, stage, json.loads(line))
            if stage == "first":
                self.answer.ahead_s = self.answer.first["time"] - time.time()
        elif self.answer.error is None:
            self._timer.cancel()
            self._process.kill()
            assert self._process.stderr is not None
            said = [text.strip() for text in self._process.stderr.read().splitlines() if text.strip()]
            self.answer.error = said[-1] if said else f"no answer (exit code {self._process.wait()})"

    def ask(self, peers: Mapping[str, int]) -> None:
        """The second question."""
        self._send(json.dumps({"peers": peers}))

    def end(self) -> None:
        """Let it go; it takes its mark away."""
        self._timer.cancel()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def local_names(hosts: Sequence[str]) -> frozenset[str]:
    """Those of the names that mean this host."""
    import socket

    import psutil

    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    found = {"localhost", socket.gethostname()}
    for name in hosts:
        try:
            if socket.gethostbyname(name) in own:
                found.add(name)
        except OSError:
            continue
    return frozenset(name for name in hosts if name in found)


def check(wanted: Wanted) -> Checked:
    """Ask every host, print the table to stderr, and give what the launcher needs to know.

    Raises:
        SetupError: a check failed. Nothing has been started.
    """
    here = local_names(wanted.hosts)
    answers, sees_first = _ask(wanted, here)
    findings = _judge(wanted, answers)
    show(wanted.hosts, findings)
    raise_if_bad(findings)
    interfaces, networks = network_of(answers, named=wanted.interface)
    return Checked(here, wanted.hosts[0] in here and sees_first, interfaces, networks)


def look_at(wanted: Wanted) -> list[Finding]:
    """Ask every host, and give what is found: for a job that goes on without those that cannot work."""
    answers, _ = _ask(wanted, local_names(wanted.hosts))
    return _judge(wanted, answers)


def _judge(wanted: Wanted, answers: Mapping[str, Answer]) -> list[Finding]:
    mine = {"versions": probe.versions(PACKAGES), "package": probe.package_digest(PACKAGE)}
    return judge(wanted, answers, mine=mine)


def _ask(wanted: Wanted, here: frozenset[str]) -> tuple[dict[str, Answer], bool]:
    """What each host says, and whether this one sees what the first one writes."""
    mark = f".horovod-jobs-check-{uuid.uuid4().hex[:12]}"
    order = {"path": wanted.path, "cwd": os.getcwd(), "packages": PACKAGES, "package": PACKAGE, "directories": wanted.directories,
             "mark": mark, "timeout_s": _PEER_TIMEOUT_S}  # fmt: skip
    talks = []
    try:
        for index, name in enumerate(wanted.hosts):
            remote = shlex.join([wanted.python, "-c", BOOTSTRAP])
            command = [wanted.python, "-c", BOOTSTRAP] if name in here else [*wanted.ssh, name, remote]
            talks.append(
                _Talk(name, command=command, order={**order, "first": index == 0}, timeout_s=wanted.timeout_s + 20)
            )
        _all(talks, "first")
        sees_first = all(os.path.exists(os.path.join(path, mark)) for path in wanted.directories)
        ports = {talk.name: talk.answer.first["port"] for talk in talks if talk.answer.first}
        for talk in talks:
            talk.ask({name: port for name, port in ports.items() if name != talk.name})
        _all(talks, "second")
    finally:
        for talk in talks:
            talk.end()
    return {talk.name: talk.answer for talk in talks}, sees_first


def _all(talks: Sequence[_Talk], stage: str) -> None:
    threads = [threading.Thread(target=talk.hear, args=(stage,), daemon=True) for talk in talks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def show(hosts: Sequence[str], findings: Sequence[Finding]) -> None:
    """The table, on stderr: a row a host."""
    from rich.console import Console
    from rich.table import Table

    table = Table("host", *COLUMNS, title="hosts")
    cells = {(one.host, one.what): one for one in findings}
    for name in hosts:
        row = []
        for column in COLUMNS:
            one = cells.get((name, column))
            row.append("" if one is None else f"[bold red]{_plain(one.value)}[/]" if one.remedy else _plain(one.value))
        table.add_row(name, *row)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _LOG_COLUMNS)
    console.print(table)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
