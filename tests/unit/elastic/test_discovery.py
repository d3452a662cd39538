"""What says which hosts there are: programs, files, Slurm."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.elastic.discovery import Fixed, HostFile, Script, Slurm, discovery, read_hosts, read_nodes


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_usual_forms_of_a_line() -> None:
    text = "a:4\nb slots=2\n c \n\n# d:9\ne:3 # busy\nworker-0.job.ns.svc\noff:0\n10.0.0.7:1\n"
    assert read_hosts(text, slots=8) == {"a": 4, "b": 2, "c": 8, "e": 3, "worker-0.job.ns.svc": 8, "10.0.0.7": 1}


@pytest.mark.parametrize(
    "line", ["a:", "a:x", "a b", "-oProxyCommand=evil", "a;rm", "a slots=", "a:1:2", "$(x)", "a:999999"]
)
def test_any_other_line_is_refused_and_named(line: str) -> None:
    with pytest.raises(SetupError, match="print one host a line"):
        read_hosts(f"good:1\n{line}", slots=1)


def test_a_host_that_is_named_twice() -> None:
    with pytest.raises(SetupError, match="names a twice"):
        read_hosts("a:1\na:2", slots=1)


def test_a_program_is_asked_each_time(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    asked = discovery(script(tmp_path / "find.sh", f"cat {hosts}"), slots=3)
    assert isinstance(asked, Script)
    hosts.write_text("a:1\n")
    assert asked.find() == {"a": 1}
    hosts.write_text("a:1\nb\n")
    assert asked.find() == {"a": 1, "b": 3}


def test_a_program_that_fails_or_hangs(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"failed with code 3 \(no cluster\)"):
        Script(script(tmp_path / "a", "echo no cluster >&2; exit 3"), slots=1).find()
    with pytest.raises(SetupError, match="did not answer"):
        Script(script(tmp_path / "b", "sleep 10"), slots=1, timeout_s=0.1).find()
    with pytest.raises(SetupError, match="is not a program that can be run"):
        discovery(str(tmp_path / "none"), slots=1)


def test_a_program_that_hangs_takes_along_what_it_has_started(tmp_path: Path) -> None:
    asked = Script(script(tmp_path / "a", f"sleep 100 & echo $! > {tmp_path}/child; wait"), slots=1, timeout_s=1)
    with pytest.raises(SetupError, match="did not answer within 1 s"):
        asked.find()
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and " Z " not in state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_stays_behind_holds_nobody_up(tmp_path: Path) -> None:
    """As an ssh does that is kept open for the next time."""
    path = tmp_path / "child"
    assert Script(script(tmp_path / "a", f"sleep 100 & echo $! > {path}; echo a:2"), slots=1, timeout_s=9).find() == {
        "a": 2
    }
    os.kill(int(path.read_text()), signal.SIGKILL)  # It is there still.


def test_what_is_no_text_is_an_error_like_any_other(tmp_path: Path) -> None:
    for found in (
        Script(script(tmp_path / "a", r"printf '\377\376:1'"), slots=1),
        HostFile(str(tmp_path / "hosts"), slots=1),
    ):
        (tmp_path / "hosts").write_bytes(b"\xff\xfe:1")
        with pytest.raises(SetupError, match="print one host a line"):
            found.find()


def test_a_file_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\n")
    asked = discovery(str(path), slots=1)
    assert isinstance(asked, HostFile)
    assert asked.find() == {"a": 2}
    path.unlink()
    with pytest.raises(SetupError, match="cannot be read"):
        asked.find()


def test_without_discovery_there_is_this_host() -> None:
    asked = discovery(None, slots=4)
    assert isinstance(asked, Fixed)
    assert asked.find() == {"localhost": 4}


def test_slurm_s_nodes_without_those_that_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "n1 allocated\nn2 down*\nn3 mixed\nn4 drained\nn5 allocated*\nn6 idle\nn7 failing\n"
    assert read_nodes(told, slots=2) == {"n1": 2, "n3": 2, "n6": 2}
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(SetupError, match="start it inside a Slurm job"):
        Slurm(slots=1)


def test_slurm_is_asked_for_this_job_s_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "sinfo", f'echo "$@" > {tmp_path}/asked; echo "n1 mixed"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert discovery("slurm", slots=2).find() == {"n1": 2}
    assert "--nodes n[1-2]" in (tmp_path / "asked").read_text()
