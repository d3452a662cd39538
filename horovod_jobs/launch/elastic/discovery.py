"""Which hosts there are now, and how many ranks each may run: asked again and again while the job runs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Protocol

from horovod_jobs.errors import SetupError

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,252})(?:(?::|\s+slots\s*=\s*)([0-9]{1,5}))?")
_LIMIT_BYTES = 1 << 20
_OPERATOR_SCRIPT = "/etc/mpi/discover_hosts.sh"


class Discovery(Protocol):
    """Says which hosts there are."""

    def find(self) -> dict[str, int]:
        """Host -> ranks it may run, in the order of preference.

        Raises:
            SetupError: it cannot be found out now. The driver then keeps what it knew.
        """


def read_hosts(text: str, *, slots: int) -> dict[str, int]:
    """Hosts from lines ``host:slots``, ``host slots=n`` or ``host`` (which gets ``slots``); empty lines and ``#`` are passed over.

    Raises:
        SetupError: a line that says something else, or a host that is named twice.
    """
    hosts: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise SetupError(f"launch.elastic.discovery says {line[:80]!r}; print one host a line, as host:slots")
        if found[1] in hosts:
            raise SetupError(f"launch.elastic.discovery names {found[1]} twice; print each host once, as host:slots")
        hosts[found[1]] = slots if found[2] is None else int(found[2])
    return {host: count for host, count in hosts.items() if count > 0}


class Fixed:
    """Always the same hosts."""

    def __init__(self, hosts: dict[str, int]) -> None:
        self._hosts = dict(hosts)

    def find(self) -> dict[str, int]:
        return dict(self._hosts)


class Script:
    """A program that prints the hosts, one a line: the user's own, or the one the MPI operator makes (/etc/mpi/discover_hosts.sh)."""

    def __init__(self, path: str, *, slots: int, timeout_s: float = 10.0) -> None:
        found = shutil.which(path) or shutil.which(str(Path(path).absolute()))
        if found is None:
            raise SetupError(
                f"launch.elastic.discovery={path} is not a program that can be run; give its path, and chmod +x it"
            )
        self._path, self._slots, self._timeout_s = found, slots, timeout_s

    def find(self) -> dict[str, int]:
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):  # Files: a child that stays behind holds nobody up.
            code = self._run(out, err)
            told, complaint = (_text(stream) for stream in (out, err))
        if code:
            said = (complaint.strip().splitlines() or ["it says nothing"])[-1][:200]
            raise SetupError(f"launch.elastic.discovery={self._path} failed with code {code} ({said}); run it by hand")
        return read_hosts(told, slots=self._slots)

    def _run(self, out: IO[bytes], err: IO[bytes]) -> int:
        try:
            process = subprocess.Popen(
                [self._path], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise SetupError(
                f"launch.elastic.discovery={self._path} did not answer ({error}); run it by hand"
            ) from error
        try:
            return process.wait(timeout=self._timeout_s)
        except subprocess.TimeoutExpired as error:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # With what it has started: it is asked again every few seconds.
            process.wait()
            raise SetupError(
                f"launch.elastic.discovery={self._path} did not answer within {self._timeout_s:g} s; run it by hand"
            ) from error


def _text(stream: IO[bytes]) -> str:
    """What a program wrote, whatever it is."""
    stream.seek(0)
    return stream.read(_LIMIT_BYTES).decode(errors="replace")


class HostFile:
    """A file with the hosts, read again each time: whoever manages the cluster rewrites it."""

    def __init__(self, path: str, *, slots: int) -> None:
        self._path, self._slots = Path(path), slots

    def find(self) -> dict[str, int]:
        try:
            return read_hosts(self._path.read_bytes().decode(errors="replace"), slots=self._slots)
        except OSError as error:
            raise SetupError(
                f"launch.elastic.discovery={self._path} cannot be read ({error.strerror}); give a file of hosts"
            ) from error


class Slurm:
    """The nodes of this Slurm job, less those that Slurm reports as down."""

    _DOWN = ("DOWN", "FAIL", "DRAIN", "NOT_RESPONDING", "UNKNOWN")

    def __init__(self, *, slots: int) -> None:
        if "SLURM_JOB_NODELIST" not in os.environ:
            raise SetupError(
                "launch.elastic.discovery=slurm and SLURM_JOB_NODELIST is not set; start it inside a Slurm job"
            )
        self._slots = slots

    def find(self) -> dict[str, int]:
        nodes = os.environ["SLURM_JOB_NODELIST"]
        command = ["sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N %T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise SetupError(
                f"sinfo does not tell the nodes of this job ({error}); see that Slurm's commands are there"
            ) from error
        return read_nodes(done.stdout, slots=self._slots)


def read_nodes(text: str, *, slots: int) -> dict[str, int]:
    """Nodes from ``sinfo``'s lines ``name state``, without those that cannot work. ``*`` marks a node that does not respond."""
    hosts = {}
    for line in text.splitlines():
        name, _, state = line.partition(" ")
        if name and "*" not in state and not any(word in state.upper() for word in Slurm._DOWN):
            hosts[name] = slots
    return hosts


def discovery(wanted: str | None, *, slots: int) -> Discovery:
    """What ``launch.elastic.discovery`` asks for: null, ``slurm``, ``mpi-operator``, a program or a file of hosts.

    Raises:
        SetupError: it cannot be used.
    """
    if wanted is None:
        return Fixed({"localhost": slots})
    if wanted == "slurm":
        return Slurm(slots=slots)
    path = _OPERATOR_SCRIPT if wanted == "mpi-operator" else wanted
    if os.path.isfile(path) and not os.access(path, os.X_OK):
        return HostFile(path, slots=slots)
    return Script(path, slots=slots)
