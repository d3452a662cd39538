"""Start members: processes of this host, or of another one by ssh. The ticket goes through standard input, never the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from horovod_jobs.comm.member import VARIABLE, Ticket
from horovod_jobs.errors import SetupError

# What must be there when Python starts; the rest of the environment travels in the ticket.
EARLY = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
# What belongs to one host and must not follow the job to another.
OWN = ("HOSTNAME", "TMPDIR", "TERM", "SHELL", "USER", "LOGNAME", "HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
HERE = ("localhost", "127.0.0.1")


class Spawner(Protocol):
    """Starts a member on a host."""

    def spawn(self, ticket: Ticket) -> Process:
        """Start the job's command there, with the ticket on its standard input."""


class Process:
    """A member's process here, or the ssh that leads to it. Its standard input stays open for as long as it is to live."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], ticket: Ticket) -> None:
        try:
            self._process = subprocess.Popen(argv, env=dict(env), stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise SetupError(f"{argv[0]} cannot be started ({error.strerror}); see that it is installed") from error
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended already; that is seen later.
            self._process.stdin.write(json.dumps(asdict(ticket)).encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it and what it has started, and wait for that."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Let go of its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


@dataclass(frozen=True)
class LocalSpawner:
    """Members on this host, whatever name discovery gives it."""

    argv: list[str]
    env: dict[str, str]

    def spawn(self, ticket: Ticket) -> Process:
        return Process(self.argv, env={**self.env, VARIABLE: "stdin"}, ticket=ticket)


@dataclass(frozen=True)
class SshSpawner:
    """Members on any host. ``ssh`` is the command up to the host's name, with its options."""

    ssh: list[str]
    argv: list[str]
    env: dict[str, str]
    directory: str

    def spawn(self, ticket: Ticket) -> Process:
        command = [*self.ssh, ticket.host, remote_command(self.argv, env=self.env, directory=self.directory)]
        late = {name: value for name, value in self.env.items() if name not in (*EARLY, *OWN)}
        # ssh itself runs in this process's own environment: it needs the agent.
        return Process(command, env=os.environ, ticket=replace(ticket, environment={**late, **ticket.environment}))


def remote_command(argv: Sequence[str], *, env: Mapping[str, str], directory: str) -> str:
    """The shell line that a host runs. Nothing in it is secret: who is on that host can read it."""
    early = [f"{name}={env[name]}" for name in EARLY if name in env]
    return f"cd {shlex.quote(directory)} && exec env {shlex.join([*early, f'{VARIABLE}=stdin', *argv])}"


@dataclass(frozen=True)
class MixedSpawner:
    """Members on this host as its processes, those on other hosts by ssh."""

    local: LocalSpawner
    ssh: SshSpawner
    own: str  # this host's name

    def spawn(self, ticket: Ticket) -> Process:
        here = ticket.host in (*HERE, self.own)
        return self.local.spawn(ticket) if here else self.ssh.spawn(ticket)
