#!/opt/horovod_jobs/bin/python -I
"""What the image of horovod-jobs starts with. The first argument says what the container is.

worker               sshd on port 2222 as an ordinary user, for the launcher of an MPIJob or a TrainJob
launcher COMMAND...  wait for the workers of /etc/mpi/hostfile, run the command (mpirun), print the run's manifest, give its exit code
COMMAND...           run it; arguments alone (``experiment=main``) are those of horovod-jobs

It uses the standard library only. Exit codes are those of the command; 5 where the world cannot be set up (horovod_jobs/errors.py).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PORT = 2222
ALIAS = "horovod-jobs-worker"  # the name of every worker's host key, in ssh_config too
STATE = Path("/tmp/horovod_jobs")  # A container's own; ssh_config names it.
HOSTFILE = Path("/etc/mpi/hostfile")
MARK = "HOROVOD_JOBS_MANIFEST"  # lines that horovod-runs fetch reads
LOST = 9  # exit code of a world that lost a rank (WorldError)
CHUNK = 8000  # characters a line: container runtimes cut lines at 16 KiB
FORWARD = {signal.SIGTERM: signal.SIGUSR1, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGUSR2}
# Of one session or one container; everything else that the pod defines reaches the ranks, which sshd starts.
_SESSION = frozenset(
    {"HOME", "HOSTNAME", "LOGNAME", "OLDPWD", "PWD", "SHELL", "SHLVL", "SSH_AUTH_SOCK", "TERM", "USER", "_"}
)
_SSHD_OFF = ("UsePAM", "StrictModes", "PasswordAuthentication", "KbdInteractiveAuthentication", "PermitRootLogin", "AllowAgentForwarding",
             "AllowTcpForwarding", "X11Forwarding", "PermitTunnel", "PermitUserRC", "PrintMotd")  # fmt: skip


class CannotStart(Exception):  # noqa: N818
    """What keeps this container from its work, with the remedy."""


def sshd_config(keys: Path, environ: Mapping[str, str]) -> str:
    """sshd's configuration: one user, one key, no terminal tricks, and the container's variables for what it starts."""
    passed = [
        f"{name}={_quoted(value)}"
        for name, value in sorted(environ.items())
        if name not in _SESSION and "\n" not in value
    ]
    lines = [
        f"Port {PORT}",
        f"HostKey {keys / 'id_rsa'}",
        f"AuthorizedKeysFile {keys / 'authorized_keys'}",
        "PidFile none",
        # StrictModes: the keys lie on a volume that belongs to root and may be readable by the pod's group.
        *(f"{name} no" for name in _SSHD_OFF),
        "MaxStartups 200",
        "ClientAliveInterval 10",
        "ClientAliveCountMax 6",
        "LogLevel FATAL",  # A readiness probe hangs up at once, and each would be a line.
    ]
    return "\n".join([*lines, *(["SetEnv " + " ".join(passed)] if passed else [])]) + "\n"


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def known_hosts(public_key: str) -> str:
    """Every worker shows the job's own key as its host key, so that knowing it is knowing the workers of this job."""
    kind, key = public_key.split()[:2]
    return f"{ALIAS} {kind} {key}\n"


def hosts_of(hostfile: str) -> list[str]:
    """Host names of an Open MPI host file."""
    lines = (line.split("#")[0].split() for line in hostfile.splitlines())
    return [words[0] for words in lines if words]


def trouble(host: str, *, timeout_s: float = 3.0) -> str | None:
    """Why a worker cannot be used; None where its sshd answers."""
    try:
        with socket.create_connection((host, PORT), timeout=timeout_s) as connection:
            connection.settimeout(timeout_s)
            return None if connection.recv(4) == b"SSH-" else f"{host}: something else than sshd answers on port {PORT}"
    except socket.gaierror as error:
        return f"{host}: the name does not resolve ({error.strerror}); the pod is not there yet or has gone"
    except OSError as error:
        return f"{host}: port {PORT} does not answer ({error.strerror or error}); sshd does not run, or a network policy is in the way"


def wait_for(
    hosts: Sequence[str],
    *,
    limit_s: float,
    look: Callable[[str], str | None] = trouble,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Until every worker answers.

    Raises:
        CannotStart: some do not within ``limit_s``; the message says which and why.
    """
    began = told = clock()
    while True:
        with ThreadPoolExecutor(min(64, len(hosts))) as pool:
            problems = [problem for problem in pool.map(look, hosts) if problem]
        if not problems:
            return
        if clock() - began > limit_s:
            raise CannotStart(
                f"{len(problems)} of {len(hosts)} workers cannot be reached after {limit_s:g} s:\n  "
                + "\n  ".join(problems[:20])
                + "\n  see their pods (horovod-runs pods JOB); HOROVOD_JOBS_WAIT_S sets the limit"
            )
        if clock() - told > 15:
            told = clock()
            print(f"waiting for {len(problems)} of {len(hosts)} workers; {problems[0]}", flush=True)
        sleep(1.0)


def prepare(keys: Path, state: Path, environ: Mapping[str, str]) -> Path:
    """Write what ssh and sshd read; gives sshd's configuration file.

    Raises:
        CannotStart: the job's keys are not mounted.
    """
    missing = [name for name in ("id_rsa", "id_rsa.pub", "authorized_keys") if not os.access(keys / name, os.R_OK)]
    if missing:
        raise CannotStart(
            f"{keys} has no readable {', '.join(missing)}: the operator mounts the job's ssh keys at sshAuthMountPath, which must be {keys}"
        )
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    (state / "known_hosts").write_text(known_hosts((keys / "id_rsa.pub").read_text()))
    config = state / "sshd_config"
    config.touch(mode=0o600)
    config.write_text(sshd_config(keys, environ))
    left_out = [name for name, value in environ.items() if name not in _SESSION and "\n" in value]
    if left_out:
        print(f"note: {', '.join(left_out)} has several lines and does not reach the ranks", flush=True)
    return config


def chunks(manifest: bytes) -> list[str]:
    """A manifest as lines of a log that a program can put together again."""
    text = base64.b64encode(zlib.compress(manifest, 9)).decode()
    parts = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    return [f"{MARK} {number}/{len(parts)} {part}" for number, part in enumerate(parts, 1)]


def find_manifest(hosts: Sequence[str], run_dir: str) -> bytes | None:
    """The manifest that the main rank wrote; it runs on the first worker, unless the volume is shared by all."""
    own = Path(run_dir) / "manifest.json"
    if own.is_file():
        return own.read_bytes()
    for host in hosts[:3]:
        command = [
            "ssh",
            "-o",
            "ConnectionAttempts=1",
            "-o",
            "ConnectTimeout=5",
            host,
            "cat",
            f"{run_dir}/manifest.json",
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
            if done.returncode == 0:
                return done.stdout
    return None


def verdict(code: int, manifest: bytes | None, *, lost: bool) -> int:
    """The attempt's exit code. mpirun's own is not to be trusted: it ends with 0, or with 255, when a host with one of its daemons is lost.

    What the run says of itself comes first; a run that is not done has not succeeded, and nor has one that lost a worker.
    """
    told = json.loads(manifest) if manifest else {}
    if told.get("status") == "done":
        return code
    if told.get("status") in ("failed", "interrupted") and told.get("exit_code"):
        return int(told["exit_code"])
    return LOST if lost else code or (LOST if told else 0)


def run_child(command: Sequence[str]) -> int:
    """Run the command and pass signals to it. Gives its exit code as a shell would.

    mpirun kills its ranks within a second of SIGTERM, and passes SIGUSR1 and SIGUSR2 on to them: these ask for a checkpoint.
    """
    child = subprocess.Popen(list(command))
    for number in FORWARD:
        signal.signal(number, lambda got, frame: child.send_signal(FORWARD[signal.Signals(got)]))
    code = child.wait()
    return 128 - code if code < 0 else code


def ranks_here(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of the ranks in this container: the children of Open MPI's daemon."""
    parents: dict[int, int] = {}
    daemons = set()
    for path in proc.iterdir():
        if not path.name.isdigit():
            continue
        try:
            name, _, rest = (path / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if name == "prted":
            daemons.add(int(path.name))
        elif state != "Z":
            parents[int(path.name)] = int(parent)
    return [pid for pid, parent in parents.items() if parent in daemons]


def worker(config: Path, *, grace_s: float) -> int:
    """Run sshd until it ends. A pod that is evicted or suspended gets SIGTERM: its ranks are asked for a checkpoint first.

    This process has the number 1 in its container: the kernel kills all others as soon as it ends, so it goes last.
    """
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-De", "-f", str(config)])
    asked: list[float] = []

    def stop(number: int, frame: object) -> None:
        if not asked:
            asked.append(time.monotonic())
            for pid in ranks_here():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        # Children of ended sessions become ours; unread, they would stay in the process table.
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == sshd.pid:
            return os.waitstatus_to_exitcode(status)
        if asked and (not ranks_here() or time.monotonic() - asked[0] > grace_s):
            os.kill(sshd.pid, signal.SIGTERM)
            return 0
        if pid == 0:
            time.sleep(0.2)


def launcher(command: Sequence[str], *, keys: Path) -> int:
    """Wait for the workers, run the command, and say which of them are gone if it fails."""
    prepare(keys, STATE, os.environ)
    try:
        hosts = hosts_of(HOSTFILE.read_text())
    except OSError as error:
        raise CannotStart(
            f"{HOSTFILE} cannot be read ({error.strerror}); the operator mounts it in a launcher"
        ) from error
    if not hosts:
        raise CannotStart(f"{HOSTFILE} names no host; give the job at least one worker")
    if os.environ.get("HOROVOD_JOBS_ELASTIC") != "1":  # An elastic job starts with those that are there.
        wait_for(hosts, limit_s=float(os.environ.get("HOROVOD_JOBS_WAIT_S", "600")))
    code = run_child(command)
    gone = [problem for problem in map(trouble, hosts) if problem]
    reached = [host for host in hosts if not any(line.startswith(f"{host}:") for line in gone)]
    run_dir = os.environ.get("HOROVOD_JOBS_RUN_DIR")
    manifest = find_manifest(reached, run_dir) if run_dir else None
    code = verdict(code, manifest, lost=bool(gone))
    if manifest is not None:
        print("\n".join(chunks(manifest)), flush=True)
    if code and gone:
        print(f"error: the attempt ended with exit code {code}, and {len(gone)} of {len(hosts)} workers cannot be reached any more:\n  "
              + "\n  ".join(gone) + "\n  see their pods (horovod-runs pods JOB); started again, the job goes on from its last checkpoint",
              file=sys.stderr, flush=True)  # fmt: skip
    elif code:
        print(
            f"error: the attempt ended with exit code {code}; all {len(hosts)} workers can still be reached",
            file=sys.stderr,
            flush=True,
        )
    return code


def main(arguments: Sequence[str]) -> int:
    """Become what the first argument says."""
    keys = Path(os.environ.get("HOROVOD_JOBS_SSH_DIR", Path.home() / ".ssh"))
    role, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    try:
        if role == "worker":
            config = prepare(keys, STATE, os.environ)
            return worker(config, grace_s=float(os.environ.get("HOROVOD_JOBS_GRACE_S", "60")))
        if role == "launcher":
            if not rest:
                raise CannotStart("a launcher needs the command that it is to run: launcher mpirun ...")
            return launcher(rest, keys=keys)
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    command = list(arguments) if shutil.which(role) else ["horovod-jobs", *arguments]
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
