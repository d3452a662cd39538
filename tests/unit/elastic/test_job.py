"""What an elastic job starts: commands without a secret, checks of its keys, and the processes themselves."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from horovod_jobs.comm.interfaces import loopback, own_address
from horovod_jobs.comm.member import VARIABLE, Ticket, read_ticket
from horovod_jobs.comm.signing import new_key
from horovod_jobs.config import ElasticConfig, LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch.base import Host, JobCommand
from horovod_jobs.launch.elastic.discovery import Fixed
from horovod_jobs.launch.elastic.job import _first_host, plan
from horovod_jobs.launch.elastic.spawn import LocalSpawner, MixedSpawner, Process, SshSpawner

HOST = Host(python="/venv/bin/python", mpirun=None, has_mpi4py=False, has_horovod=True, cores=8, is_root=False)
JOB = JobCommand("job", ("fit.epochs=1", "launch=none"), ("horovod-jobs",), {"run": {"root": "out", "id": None}})
LOCAL = LaunchConfig(kind="local", np=2)
TICKET = Ticket(
    "member-1", new_key().hex(), "127.0.0.1", 1, "a", "eth0", 0.5, 15.0, 30, environment={"HOROVOD_CONTROLLER": "gloo"}
)


def elastic(**changes: object) -> LaunchConfig:
    return replace(LOCAL, elastic=replace(ElasticConfig(), **changes))  # type: ignore[arg-type]


def test_every_rank_writes_into_one_run() -> None:
    made = plan(LOCAL, job=JOB, host=HOST, environ={"PATH": "/bin", "SECRET": "x"})
    assert made.argv[:-1] == ["/venv/bin/python", "-m", "horovod_jobs", "fit.epochs=1", "launch=none"]
    run_id = made.argv[-1].removeprefix("run.id='").removesuffix("'")
    assert made.run_dir == Path("out") / run_id
    assert "SECRET" not in made.env
    named = JobCommand("job", (), (), {"run": {"root": "out", "id": "mine"}})
    assert plan(LOCAL, job=named, host=HOST, environ={}).argv[-1] == "run.id='mine'"


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        (replace(LOCAL, kind="slurm"), "cannot be started by launch=slurm"),
        (replace(LOCAL, controller="mpi"), "needs Gloo"),
        (elastic(min_np=3), "min_np=3 does not fit launch.elastic.max_np=2"),
        (elastic(min_np=0), "min_np=0"),
        (elastic(lease_s=0.0), "lease_s=0.0 is not positive"),
        (elastic(cooldown_s=-1.0), "cooldown_s=-1.0 is negative"),
        (elastic(lease_s=1.0), "less than four beats"),
    ],
)
def test_keys_that_cannot_work_are_named(launch: LaunchConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(launch, job=JOB, host=HOST, environ={})


def test_stages_side_by_side_and_a_missing_horovod() -> None:
    side = JobCommand("job", (), (), {"run": {"parallel_stages": 2}})
    with pytest.raises(ConfigError, match="run.parallel_stages=2 needs a world that stays"):
        plan(LOCAL, job=side, host=HOST, environ={})
    with pytest.raises(SetupError, match="Horovod, which is not installed"):
        plan(LOCAL, job=JOB, host=replace(HOST, has_horovod=False), environ={})


_TELLS = """
import json, os, sys
line = sys.stdin.readline()
told = {"argv": sys.argv, "environ": dict(os.environ), "line": line, "cwd": os.getcwd()}
path = sys.argv[-1]
open(path + ".new", "w").write(json.dumps(told))
os.rename(path + ".new", path)
sys.stdin.read()
"""


def told_by(path: Path) -> dict[str, object]:
    wait(path.exists)
    found: dict[str, object] = json.loads(path.read_text())
    return found


def wait(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: Process) -> None:
    process.kill()
    assert process.poll() is not None


def test_the_key_is_on_standard_input_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "told"
    process = LocalSpawner([sys.executable, "-c", _TELLS, str(path)], {"WANTED": "1"}).spawn(TICKET)
    told = told_by(path)
    end(process)
    assert read_ticket(str(told["line"]).encode()) == TICKET
    assert TICKET.key not in json.dumps([told["argv"], told["environ"]])
    assert told["environ"] == {**told["environ"], "WANTED": "1", VARIABLE: "stdin"}  # type: ignore[dict-item]
    assert "HOME" not in told["environ"]  # type: ignore[operator]


def test_the_way_over_ssh_shows_no_key_either(tmp_path: Path) -> None:
    path = tmp_path / "told"
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\nshift 2\nexec sh -c "$*"\n')
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "MY_TOKEN": "secret-1", "HOME": "/elsewhere"}
    spawner = SshSpawner([str(fake), "-q"], [sys.executable, "-c", _TELLS, str(path)], env, str(tmp_path))
    process = spawner.spawn(TICKET)
    told = told_by(path)
    end(process)
    ticket = read_ticket(str(told["line"]).encode())
    assert ticket.environment == {"MY_TOKEN": "secret-1", "HOROVOD_CONTROLLER": "gloo"}
    assert replace(ticket, environment=TICKET.environment) == TICKET
    shown = json.dumps([told["argv"], Path(f"/proc/{os.getpid()}/cmdline").read_bytes().decode()])
    assert TICKET.key not in shown
    assert "secret-1" not in shown
    assert told["cwd"] == str(tmp_path)


def test_this_host_needs_no_ssh(tmp_path: Path) -> None:
    local = LocalSpawner([sys.executable, "-c", _TELLS, str(tmp_path / "here")], {})
    mixed = MixedSpawner(local, SshSpawner(["/bin/false"], [], {}, "/"), own="me")
    for name in ("me", "localhost"):
        (tmp_path / "here").unlink(missing_ok=True)
        process = mixed.spawn(replace(TICKET, host=name))
        assert told_by(tmp_path / "here")
        end(process)
    other = mixed.spawn(TICKET)
    wait(lambda: other.poll() is not None)
    assert other.poll() == 1
    other.kill()


def test_a_member_is_ended_with_what_it_started_even_where_it_is_stopped(tmp_path: Path) -> None:
    code = "import os, subprocess, sys; c = subprocess.Popen(['sleep', '100']); open(sys.argv[1], 'w').write(str(c.pid)); sys.stdin.read()"
    process = Process([sys.executable, "-c", code, str(tmp_path / "child")], env=dict(os.environ), ticket=TICKET)
    wait(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    child = int((tmp_path / "child").read_text())
    os.kill(process.pid, signal.SIGSTOP)
    process.kill()
    assert process.poll() == -signal.SIGKILL
    wait(
        lambda: (
            not Path(f"/proc/{child}").exists()
            or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        )
    )


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(SetupError, match="/no/ssh cannot be started"):
        Process(["/no/ssh"], env={}, ticket=TICKET)


def test_the_job_s_interface() -> None:
    assert own_address(loopback(), towards="") == ("127.0.0.1", loopback())
    with pytest.raises(SetupError, match="launch.hosts.interface=none0 is not here"):
        own_address("none0", towards="")
    with pytest.raises(SetupError, match="set launch.hosts.interface"):
        own_address(None, towards=socket.gethostbyname("localhost"))
    assert _first_host(Fixed({"b": 2, "a": 1}), own="b", within_s=1) == "a"
    assert _first_host(Fixed({"b": 2}), own="b", within_s=1) == "b"
    with pytest.raises(SetupError, match="has named no host that can be used for 0 s"):
        _first_host(Fixed({}), own="b", within_s=0)
