"""``launch=hosts`` over hosts that are network namespaces, with ssh between them: what is refused, what runs, and how it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, hosts, why_not
from tests.integration.support import (
    JOB,
    TINY,
    Done,
    environment,
    events,
    processes,
    valid_manifest,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=why_not() or ""), pytest.mark.timeout(600)]
# Real pictures (8x8 digits that come with scikit-learn), a small net, and enough steps that a signal finds it at work.
SMALL = (*TINY, "data=digits", "model=mlp", "fit.epochs=1", "fit.max_steps=6")
LONG = (
    *TINY,
    "data=digits",
    "model=mlp",
    "fit.epochs=400",
    "fit.checkpoint_every_steps=10",
    "fit.validate_every_epochs=0",
)
LIMIT_S = 200.0
SECRET = "a-value-that-ps-must-not-show"


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


@dataclass
class Over:
    """A job that was started on the first host."""

    process: subprocess.Popen[str]
    out: Path
    err: Path
    mark: str

    def launcher(self) -> int:
        """The process of ``launch=hosts``: the first of its kind below the one that entered the host."""

        def look() -> int | None:
            pid = self.process.pid
            while True:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"horovod_jobs" in words and Path(f"/proc/{pid}/exe").resolve().name.startswith("python"):
                    return pid
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                if not children:
                    return None
                pid = int(children[0])

        return wait_for(look, what="the launcher", timeout_s=20)

    def wait(self) -> Done:
        """Its end; a job that does not end in time is killed."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            for pid in processes(self.mark):
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"the job did not end\n{self.err.read_text()}") from None
        done = Done(code, self.out.read_text(), self.err.read_text(), time.monotonic() - started)
        wait_for(lambda: not processes(self.mark), what=f"no process to be left: {processes(self.mark)}", timeout_s=20)
        return done


def start(two: Hosts, *arguments: str, cwd: Path, listed: str = "", env: dict[str, str] | None = None) -> Over:
    """Start a job over both hosts, one rank on each, from the first of them."""
    listed = listed or f"[{two.names[0]}:1,{two.names[1]}:1]"
    command = [*JOB, *arguments, "launch=hosts", f"launch.hosts.list={listed}", "launch.hosts.connect_timeout_s=3"]
    return start_command(two, command, cwd=cwd, env=env)


def start_command(two: Hosts, command: Sequence[str], *, cwd: Path, env: dict[str, str] | None = None) -> Over:
    """Start any command on the first host."""
    mark = f"{time.monotonic_ns()}"
    out, err = cwd / f"out-{mark}.txt", cwd / f"err-{mark}.txt"
    shell = ["sh", "-c", f'cd {cwd} && exec "$@" >{out} 2>{err}', "sh", *command]
    process = two.start(shell, env={**environment(mark), **(env or {})})
    return Over(process, out, err, mark)


def run(two: Hosts, *arguments: str, cwd: Path, listed: str = "", env: dict[str, str] | None = None) -> Done:
    return start(two, *arguments, cwd=cwd, listed=listed, env=env).wait()


# --- what is refused, before anything starts ------------------------------------------------------------------------------
def refused(done: Done, cwd: Path, *, code: int = 5) -> str:
    """The one line of an error, where nothing was started."""
    assert done.code == code, done.text
    assert len(done.errors) == 1, done.text
    assert "Traceback" not in done.err, done.text
    assert not list(cwd.glob("runs/*")), "no run was begun, and no mark of the checks is left"
    return done.errors[0]


def test_a_wrong_name_and_a_host_that_is_down(two: Hosts, tmp_path: Path) -> None:
    listed = f"[{two.names[0]}:1,nosuchhost:1,{two.names[1]}:1]"
    two.cut(1)
    try:
        done = run(two, *SMALL, cwd=tmp_path, listed=listed)
    finally:
        two.mend(1)
    error = refused(done, tmp_path)
    assert "error: host nosuchhost: ssh: Could not resolve" in error
    assert "correct the name in launch.hosts.list" in error
    assert "(1 more in the table)" in error
    rows = table(done)
    assert list(rows) == [two.names[0], "nosuchhost", two.names[1]], done.text
    assert "timed out" in rows[two.names[1]] or "No route" in rows[two.names[1]], done.text


def table(done: Done) -> dict[str, str]:
    """The rows of the table of checks, by host."""
    return {line.split()[1]: line for line in done.err.splitlines() if line.startswith("│")}


def test_another_version_and_a_file_system_of_its_own_on_one_host(two: Hosts, tmp_path: Path) -> None:
    place = Path(str(distribution("torch").locate_file("")))
    (metadata,) = place.glob("torch-*.dist-info/METADATA")
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace("\nVersion: ", "\nVersion: 0.1+", 1))
    work = tmp_path / "work"
    work.mkdir()
    assert two.run(["mount", "--bind", str(other), str(metadata)], host=1).returncode == 0
    assert two.run(["mount", "-t", "tmpfs", "tmpfs", str(work)], host=1).returncode == 0
    try:
        done = run(two, *SMALL, cwd=work)
    finally:
        two.run(["umount", str(metadata)], host=1)
        two.run(["umount", str(work)], host=1)
    error = refused(done, work)
    assert f"error: host {two.names[1]}: torch: 0.1+" in error
    assert "install the same environment at the same path on every host" in error
    assert "(1 more in the table)" in error
    assert "runs: not the first host's, " in table(done)[two.names[1]], done.text
    assert " shared " in table(done)[two.names[0]], done.text


def test_the_key_of_a_host_is_checked_unless_the_user_says_otherwise(two: Hosts, tmp_path: Path) -> None:
    names = two.directory / "hosts"
    names.write_text(names.read_text() + f"{two.addresses[1]} stranger\n")  # A name that no key is known for.
    listed = f"[{two.names[0]}:1,stranger:1]"
    error = refused(run(two, *SMALL, cwd=tmp_path, listed=listed), tmp_path)
    assert "error: host stranger: ssh: Host key verification failed." in error
    assert "launch.hosts.check_host_keys=false" in error
    loose = ("launch.hosts.check_host_keys=false", "launch.hosts.interface=ib0")
    error = refused(run(two, *SMALL, *loose, cwd=tmp_path, listed=listed), tmp_path)  # ssh itself is no obstacle now.
    assert f"host {two.names[0]}: network: no ib0 (eth0, lo); correct launch.hosts.interface" in error


# --- what runs, is stopped, and goes on -----------------------------------------------------------------------------------
def stopped(two: Hosts, number: int, *extra: str, cwd: Path, listed: str = "") -> Done:
    """A long job that gets a signal after two checkpoints of its own."""
    seen = len(checkpoints(cwd))
    running = start(two, *LONG, *extra, "launch.env=[MY_TOKEN]", cwd=cwd, listed=listed, env={"MY_TOKEN": SECRET})
    wait_for(
        lambda: len(checkpoints(cwd)) >= seen + 2 or running.process.poll() is not None,
        what="checkpoints",
        timeout_s=LIMIT_S,
    )
    assert running.process.poll() is None, running.err.read_text()
    safely_started(running)
    os.kill(running.launcher(), number)
    return running.wait()


def safely_started(running: Over) -> None:
    """ssh has its options, ranks have the variable that was named, and no command line shows its value."""
    commands = processes(running.mark)
    ssh = [command for command in commands.values() if command.split()[0].endswith("ssh")]
    options = ("BatchMode=yes", "StrictHostKeyChecking=yes", "ServerAliveInterval=15", "ConnectTimeout=3")
    assert ssh, commands
    assert all(option in command for command in ssh for option in options), ssh
    ranks = [
        pid
        for pid, command in commands.items()
        if command.startswith(f"{sys.executable} -m horovod_jobs --config-name")
    ]
    assert len(ranks) == 2, commands
    assert all(f"MY_TOKEN={SECRET}".encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in ranks)
    assert not [command for command in commands.values() if SECRET in command]


def checkpoints(cwd: Path) -> list[int]:
    """Steps of every checkpoint that any run here has told of."""
    return [
        entry["step"]
        for path in cwd.glob("runs/2*")
        for entry in events(cwd, run=path.name)
        if entry["event"] == "checkpoint"
    ]


def test_a_job_over_two_hosts_is_stopped_in_order_and_goes_on_under_gloo(two: Hosts, tmp_path: Path) -> None:
    # Rank 0 is on the other host: its code must come back from there.
    backwards = f"[{two.names[1]}:1,{two.names[0]}:1]"
    done = stopped(two, signal.SIGTERM, "launch.controller=mpi", cwd=tmp_path, listed=backwards)
    in_order(done, tmp_path, code=75)
    done = stopped(two, signal.SIGINT, "launch.controller=gloo", cwd=tmp_path)
    in_order(done, tmp_path, code=130)
    assert resumed(tmp_path) >= 10, "it went on from the checkpoint that the other controller's ranks wrote"
    # A job of its own, to the end.
    done = run(two, *SMALL, "launch.controller=mpi", cwd=tmp_path)
    assert done.code == 0, done.text
    told = valid_manifest(tmp_path)
    assert told["world"] == {"size": 2, "hosts": 2, "controller": "mpi"}
    assert len(weights(tmp_path)) == 1


def resumed(cwd: Path) -> int:
    """The step from which the latest run went on."""
    return next(int(entry["step"]) for entry in events(cwd) if entry["event"] == "resume")


def in_order(done: Done, cwd: Path, *, code: int) -> None:
    assert done.code == code, done.text
    assert len(done.errors) == 1, done.text
    assert "the same command goes on from here" in done.errors[0]
    assert "Traceback" not in done.err, done.text
    told = valid_manifest(cwd)
    assert (told["status"], told["exit_code"]) == ("interrupted", code)
    assert not list(cwd.glob("runs/.launch-*")), "nothing of the launcher is left"
