"""What is started, without starting it; and the world that is, with a stand-in launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from horovod_jobs import early
from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch import in_rank
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan
from horovod_jobs.launch.local import plan, plan_job, start
from horovod_jobs.launch.process import run_world

HOST = Host(python="/venv/bin/python", mpirun="/venv/bin/mpirun", has_mpi4py=True,
            has_horovod=True, cores=8, is_root=False)  # fmt: skip
ENVIRON = {"PATH": "/usr/bin", "HOME": "/home/me", "AWS_SECRET_ACCESS_KEY": "secret", "HOROVOD_CYCLE_TIME": "2",
           "OMPI_COMM_WORLD_RANK": "3",
           "HOROVOD_RANK": "3", "LC_ALL": "C", "MY_TOKEN": "x"}  # fmt: skip


def planned(launch: LaunchConfig, host: Host = HOST) -> LaunchPlan:
    return plan(launch, host=host, environ=ENVIRON, command=["python", "job"])


def test_the_tuned_mpi_command() -> None:
    assert planned(LaunchConfig(kind="local", np=4)).argv == [
        "/venv/bin/mpirun", "-np", "4", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE",
        "--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "self,sm", "--mca", "pml", "ob1",
        "--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "4", "python", "job",
    ]  # fmt: skip


def test_mpi_is_told_to_outlive_ranks_where_the_strategy_can() -> None:
    job = JobCommand("job", (), ("horovod-jobs",), outlives_ranks=True)
    able = Host(**{**HOST.__dict__, "has_ulfm": True})
    argv = plan_job(LaunchConfig(kind="local", np=4), job=job, host=able, environ=ENVIRON).argv
    assert argv[argv.index("--with-ft") + 1] == "ulfm"
    assert argv.index("--with-ft") < argv.index("/venv/bin/python")
    other = JobCommand("job", (), ("horovod-jobs",))
    for what, where in ((other, able), (job, HOST)):
        assert "--with-ft" not in plan_job(LaunchConfig(kind="local", np=4), job=what, host=where, environ=ENVIRON).argv


def test_only_what_a_rank_needs_of_the_environment_travels() -> None:
    env = planned(LaunchConfig(kind="local", np=4, env=["MY_TOKEN"])).env
    assert env == {"PATH": "/venv/bin:/usr/bin", "HOME": "/home/me", "HOROVOD_CYCLE_TIME": "2", "LC_ALL": "C", "MY_TOKEN": "x",
                   "OMP_NUM_THREADS": "2"}  # fmt: skip
    with pytest.raises(ConfigError, match="launch.env names NOT_SET, which is not set here"):
        planned(LaunchConfig(kind="local", np=4, env=["NOT_SET"]))


def test_root_and_threads() -> None:
    env = planned(LaunchConfig(kind="local", np=16, threads=3), Host(**{**HOST.__dict__, "is_root": True})).env
    assert env["OMPI_ALLOW_RUN_AS_ROOT"] == env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert env["OMP_NUM_THREADS"] == "3"


def test_gloo_is_taken_where_mpi_is_not() -> None:
    for change in ({"mpirun": None}, {"has_mpi4py": False}):
        host = Host(**{**HOST.__dict__, **change})
        found = planned(LaunchConfig(kind="local", np=2), host)
        assert (found.controller, found.argv) == ("gloo", ["python", "job"])
        with pytest.raises(SetupError, match="launch.controller=mpi needs (mpirun|mpi4py), which is not installed"):
            planned(LaunchConfig(kind="local", np=2, controller="mpi"), host)


@pytest.mark.parametrize("more", [[], ["strategy=parameter_server", "launch.np=3"], ["strategy=elastic"]])
def test_the_launcher_of_a_local_world_loads_no_torch(more: list[str]) -> None:
    """It would take longer than anything else that it does, and be kept as long as the job runs."""
    words = ["horovod-jobs", "debug=fast", "graph=train", "launch=local", "launch.np=2", "launch.dry_run=true", *more]
    script = (
        f"import sys; sys.argv = {words}; from horovod_jobs.__main__ import main; main(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_without_horovod_a_world_says_how_to_build_it() -> None:
    with pytest.raises(SetupError, match="launch/build_horovod.sh"):
        planned(LaunchConfig(kind="local", np=2), Host(**{**HOST.__dict__, "has_horovod": False}))


def world_of(script: str) -> LaunchPlan:
    return LaunchPlan([sys.executable, "-c", script], {**os.environ, "PYTHONPATH": os.getcwd()}, "mpi")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import sys; sys.exit(137)", 9),  # mpirun says so of a rank that was killed
        (
            "import sys; from horovod_jobs.launch import in_rank as r; r.record_exit(0); r.record_lost(1); sys.exit(137)",
            0,
        ),
        ("from horovod_jobs.launch import in_rank; in_rank.record_exit(75)", 75),
        ("import sys; from horovod_jobs.launch import in_rank; in_rank.record_exit(75); sys.exit(1)", 75),
    ],
)
def test_the_exit_code_is_the_jobs(script: str, code: int) -> None:
    assert run_world(world_of(script), grace_s=1.0) == code


@pytest.mark.parametrize(
    ("codes", "code"),
    [((), 0), ((0, 0), 0), ((0, 75), 75), ((3, 8), 3), ((9, 8), 8), ((9, 0, 9), 9)],
    ids=["none", "all well", "one stopped", "the lowest rank", "its own error", "only missed"],
)
def test_the_code_of_all_ranks(codes: tuple[int, ...], code: int) -> None:
    assert in_rank.code_of_all(codes) == code


def test_what_mpirun_keeps_is_removed_even_if_it_was_killed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    script = (
        "import os, pathlib\n"
        "base = pathlib.Path(os.environ['PRTE_MCA_prte_local_tmpdir_base'])\n"
        "(base / f'ompi.{os.getpid()}').mkdir()\n"
        f"pathlib.Path({str(place)!r}).write_text(str(base))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert run_world(world_of(script), grace_s=1.0) == 137
    assert not Path(place.read_text()).exists()


RANK = """
import os, signal, sys, time, pathlib
from horovod_jobs.launch import in_rank
def stop(number, frame):
    if {obey}:
        in_rank.record_exit(75); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
in_rank.register_rank()
pathlib.Path({ready!r}).touch()
while True: time.sleep(0.05)
"""


@contextmanager
def told(number: signal.Signals, *, when: Path) -> Iterator[None]:
    """This process gets the signal in the body, once a rank has made the file ``when``."""

    def later() -> None:
        while not when.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=later)
    sender.start()
    yield
    sender.join()


@pytest.mark.parametrize(("obey", "code"), [(True, 75), (False, 143)])
def test_sigterm_reaches_the_ranks_and_the_deaf_are_killed(tmp_path: Path, obey: bool, code: int) -> None:
    ready = tmp_path / "ready"
    started = time.monotonic()
    # A deaf rank ignores SIGTERM, from us and from the launcher: only SIGKILL ends it, after the grace and ten seconds more.
    with told(signal.SIGTERM, when=ready):
        got = run_world(world_of(RANK.format(obey=obey, ready=str(ready))), grace_s=0.5)
    assert got == code
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("registered", "code"), [(True, 130), (False, 130)], ids=["ranks listen", "no rank yet"])
def test_the_launcher_answers_ctrl_c_for_its_ranks(
    tmp_path: Path, registered: bool, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "ready"
    script = (
        "import pathlib, signal, sys, time\n"
        "from horovod_jobs.launch import in_rank\n"
        "def stop(*_): in_rank.record_exit(130); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"if {registered}: in_rank.register_rank()\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    with told(signal.SIGINT, when=ready):
        assert run_world(world_of(script), grace_s=5.0) == code
    assert capfd.readouterr().err.split("\n") == (
        ["", "Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.", ""]
        if registered
        else [f"error: {early.said(signal.SIGINT)}", ""]
    )


def test_a_world_of_gloo_meets_on_the_loopback_and_shows_no_variable_on_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
import os
told = {name: os.environ[name] for name in ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_GLOO_IFACE")}
commands = [open(f"/proc/{pid}/cmdline", "rb").read() for pid in (os.getpid(), os.getppid())]
address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
print(*told.values(), address, os.environ["MY_TOKEN"], any(("a-" + "secret").encode() in one for one in commands))
"""
    monkeypatch.chdir(tmp_path)
    launch = LaunchConfig(kind="local", np=2, controller="gloo", env=["MY_TOKEN"])
    made = plan(
        launch, host=HOST, environ={**os.environ, "MY_TOKEN": "a-secret"}, command=[sys.executable, "-c", script]
    )
    assert start(launch, made) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"{rank} 2 {rank} lo 127.0.0.1 a-secret False" for rank in (0, 1)
    ]
