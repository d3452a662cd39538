"""Ranks kept by stations of this host, without ssh: what they tell each other, their output, codes and signals, and their end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.hosts import hub, station
from horovod_jobs.launch.hosts.hub import Station, run_stations

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_OTHERS_S", 0.5)
    monkeypatch.setattr(hub, "_INSIST_S", 0.5)


def stations(script: str, *, cwd: Path, ranks: Sequence[int] = (1, 1), python: str = sys.executable) -> list[Station]:
    """A station a host, with so many ranks each, that run a script."""
    made, rank = [], 0
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    for number, count in enumerate(ranks):
        variables = [{"HOROVOD_RANK": str(rank + local), "HOROVOD_SIZE": str(sum(ranks))} for local in range(count)]
        rank += count
        made.append(
            Station(
                f"host{number}", [sys.executable], [python, "-u", "-c", script], str(cwd), env, variables, here=True
            )
        )
    return made


def run(
    script: str, *, cwd: Path, grace_s: float = 20.0, ranks: Sequence[int] = (1, 1), python: str = sys.executable
) -> int:
    return run_stations(stations(script, cwd=cwd, ranks=ranks, python=python), grace_s=grace_s, keepalive_s=5.0)


STORE = """
import http.client, os, sys, time
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
def ask(method, path, body=None):
    address, port = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()
assert ask("GET", "/global/nothing")[0] == 404
assert ask("PUT", f"/global/{rank}", bytes([rank, 255, 0]))[0] == 200
for other in range(size):
    while ask("GET", f"/global/{other}") != (200, bytes([other, 255, 0])):
        time.sleep(0.01)
assert ask("PUT", "/a/b/c", b"x")[0] == 400
ask("DELETE", f"/global/{rank}")
deadline = time.monotonic() + 10
while ask("GET", "/global/0")[0] != 404:
    assert time.monotonic() < deadline
    time.sleep(0.01)
print("rank", rank, "has met everybody", "SECRET" in os.environ)  # Which Python writes in pieces.
print("rank", rank, "to stderr", file=sys.stderr)
"""


def test_ranks_of_two_hosts_find_each_other_and_their_output_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(STORE, cwd=tmp_path, ranks=(2, 1)) == 0
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == [f"rank {rank} has met everybody False" for rank in range(3)]
    assert sorted(shown.err.splitlines()) == [f"rank {rank} to stderr" for rank in range(3)]


def test_a_ranks_output_goes_on_in_whole_lines_and_what_is_no_line_yet_does_not_wait_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(station, "say", lambda **report: told.put(report["text"]))
    reading, writing = os.pipe()
    thread = threading.Thread(target=station.relay, args=(os.fdopen(reading, "rb", buffering=0), 3, 1))
    thread.start()
    os.write(writing, b"one\ntwo\nthr")
    assert told.get(timeout=10) == "one\ntwo\n"
    os.write(writing, b"ee\n? ")
    assert told.get(timeout=10) in ("thr", "three\n")  # In two parts where this machine was slow.
    seen = told.get(timeout=10)
    assert (seen if seen == "? " else told.get(timeout=10)) == "? ", "a prompt is shown"
    os.write(writing, b"end")
    os.close(writing)
    assert told.get(timeout=10) == "end"
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("import os, sys; sys.exit(3 if os.environ['HOROVOD_RANK'] == '1' else 0)", 3),
        ("import os; os.environ['HOROVOD_RANK'] == '1' and os.kill(os.getpid(), 9)", 9),
        ("from horovod_jobs.launch import in_rank; in_rank.record_exit(75)", 75),
        ("import sys; from horovod_jobs.launch import in_rank; in_rank.record_exit(7); sys.exit(1)", 7),
    ],
)
def test_the_exit_code_is_the_jobs(script: str, code: int, tmp_path: Path) -> None:
    assert run(script, cwd=tmp_path) == code


def test_when_a_rank_has_failed_the_others_are_not_left(tmp_path: Path) -> None:
    started = time.monotonic()
    script = "import os, sys, time\nif os.environ['HOROVOD_RANK'] == '1': sys.exit(4)\ntime.sleep(600)"
    assert run(script, cwd=tmp_path) == 4
    assert time.monotonic() - started < 30


OBEY = """
import os, pathlib, signal, sys, time
from horovod_jobs.launch import in_rank
def stop(number, frame):
    if {obey}:
        in_rank.record_exit({{signal.SIGTERM: 75, signal.SIGINT: 130}}[number]); sys.exit(1)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
pathlib.Path("ready-" + os.environ["HOROVOD_RANK"]).write_text(str(os.getpid()))
while True: time.sleep(0.05)
"""


def pids(cwd: Path) -> list[int]:
    """The ranks that are ready."""
    return [int(path.read_text() or 0) for path in sorted(cwd.glob("ready-*"))]


def ready(cwd: Path) -> None:
    deadline = time.monotonic() + 60
    while len(pids(cwd)) < 2 or 0 in pids(cwd):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("number", "obey", "code"), [(signal.SIGTERM, True, 75), (signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_reaches_every_rank_and_the_deaf_are_killed(
    number: signal.Signals, obey: bool, code: int, tmp_path: Path
) -> None:
    def later() -> None:
        ready(tmp_path)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=later)
    sender.start()
    assert run(OBEY.format(obey=obey), cwd=tmp_path, grace_s=60.0 if obey else 0.5) == code
    sender.join()
    assert all(gone(pid) for pid in pids(tmp_path))


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.unit.launch.test_hub import *; run(OBEY.format(obey=True), cwd=Path({str(tmp_path)!r}))"  # noqa: E501
    launcher = subprocess.Popen([sys.executable, "-c", program])
    ready(tmp_path)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in pids(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lost_host_is_named_and_so_is_one_that_cannot_start_a_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = stations("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", cwd=tmp_path, ranks=(1,))
    assert run_stations(lost, grace_s=5.0, keepalive_s=5.0) == 9
    assert "error: host host0 was lost while ranks [0] ran there; see that it is up" in capfd.readouterr().err
    assert run("import os; os.kill(os.getpid(), 9)", cwd=tmp_path, ranks=(1,)) == 9
    assert "error: rank 0 on host0 was ended by signal 9; see its log" in capfd.readouterr().err
    with pytest.raises(
        SetupError, match="host host0 cannot start a rank .*No such file.*install the same environment there"
    ):
        run("pass", cwd=tmp_path, ranks=(1,), python="/nowhere/python")
