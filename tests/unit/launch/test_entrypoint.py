"""The image's entry point, without the image: what it writes for ssh, how it waits, and what it prints at the end."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from horovod_jobs.errors import ArtifactError
from horovod_jobs.launch.kubernetes.log import MARK, is_part, manifest_in

PATH = Path(__file__).resolve().parents[3] / "launch" / "image" / "entrypoint.py"
_spec = importlib.util.spec_from_file_location("entrypoint", PATH)
assert _spec is not None
assert _spec.loader is not None
entrypoint = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(entrypoint)


@contextmanager
def server(greeting: bytes) -> Iterator[int]:
    """Something on a free port that greets whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(greeting)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def test_sshd_passes_the_containers_variables_on_and_nothing_of_the_session() -> None:
    made = entrypoint.sshd_config(Path("/k"), {"HOME": "/x", "TOKEN": 'a "b" \\c', "PATH": "/v/bin", "LINES": "1\n2"})
    lines = made.splitlines()
    assert 'SetEnv PATH="/v/bin" TOKEN="a \\"b\\" \\\\c"' in lines
    assert {
        "Port 2222",
        "HostKey /k/id_rsa",
        "AuthorizedKeysFile /k/authorized_keys",
        "PasswordAuthentication no",
    } <= set(lines)
    assert "LINES" not in made


def test_the_jobs_key_is_the_one_host_key() -> None:
    assert (
        entrypoint.known_hosts("ecdsa-sha2-nistp521 AAAA comment\n") == "horovod-jobs-worker ecdsa-sha2-nistp521 AAAA\n"
    )
    ssh = (PATH.parent / "ssh_config").read_text()
    assert f"HostKeyAlias {entrypoint.ALIAS}" in ssh
    assert f"UserKnownHostsFile {entrypoint.STATE}/known_hosts" in ssh
    assert "StrictHostKeyChecking yes" in ssh
    assert f"Port {entrypoint.PORT}" in ssh


def test_a_host_file() -> None:
    text = "demo-worker-0.demo-worker.ml.svc slots=2\n# no host\n\ndemo-worker-1.demo-worker.ml.svc slots=2\n"
    assert entrypoint.hosts_of(text) == ["demo-worker-0.demo-worker.ml.svc", "demo-worker-1.demo-worker.ml.svc"]


def test_missing_keys_name_the_mount_path(tmp_path: Path) -> None:
    with pytest.raises(
        entrypoint.CannotStart, match="has no readable id_rsa, id_rsa.pub, authorized_keys.*sshAuthMountPath"
    ):
        entrypoint.prepare(tmp_path, tmp_path / "state", {})


def test_what_is_written_is_for_this_user_alone(tmp_path: Path) -> None:
    for name in ("id_rsa", "id_rsa.pub", "authorized_keys"):
        (tmp_path / name).write_text("ecdsa-sha2-nistp521 AAAA\n")
    config = entrypoint.prepare(tmp_path, tmp_path / "state", {"TOKEN": "secret"})
    assert (config.stat().st_mode & 0o777, config.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_worker_is_there_when_its_sshd_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b"SSH-2.0-x\r\n") as port:
        monkeypatch.setattr(entrypoint, "PORT", port)
        assert entrypoint.trouble("127.0.0.1") is None
    with server(b"HTTP/1.1 400\r\n") as port:
        monkeypatch.setattr(entrypoint, "PORT", port)
        assert "something else than sshd answers" in entrypoint.trouble("127.0.0.1")
    monkeypatch.setattr(entrypoint, "PORT", 1)
    assert "127.0.0.1: port 1 does not answer (Connection refused)" in entrypoint.trouble("127.0.0.1")


def test_waiting_ends_and_names_who_is_missing() -> None:
    now = [0.0]
    came = {"a": 0.0, "b": 5.0, "c": 99.0}

    def look(host: str) -> str | None:
        return None if now[0] >= came[host] else f"{host}: not there"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    entrypoint.wait_for(["a", "b"], limit_s=30, look=look, clock=lambda: now[0], sleep=sleep)
    assert 5 <= now[0] < 7
    with pytest.raises(
        entrypoint.CannotStart, match=r"(?s)1 of 3 workers cannot be reached after 30 s:\n  c: not there"
    ):
        entrypoint.wait_for(["a", "b", "c"], limit_s=30, look=look, clock=lambda: now[0], sleep=sleep)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_manifest_goes_through_a_log(size: int) -> None:
    value = {"run_id": "x", "text": secrets.token_hex(size)}
    lines = entrypoint.chunks(json.dumps(value).encode())
    assert (len(lines) > 1) == (size > 10_000)
    assert all(len(line) < 16_000 and is_part(line) for line in lines)
    earlier = entrypoint.chunks(b'{"run_id": "earlier"}')
    assert manifest_in(["training", *earlier, "more", *lines, "the end"]) == value
    if len(lines) > 1:
        assert manifest_in([*earlier, *lines[:-1]]) == {"run_id": "earlier"}, "half a manifest is none"


def test_a_damaged_manifest_is_said() -> None:
    assert manifest_in(["nothing"]) is None
    with pytest.raises(ArtifactError, match="the manifest in the log is damaged"):
        manifest_in([f"{MARK} 1/1 AAAA"])


@pytest.mark.parametrize(
    ("code", "told", "lost", "wanted"),
    [
        (0, {"status": "done", "exit_code": 0}, False, 0),
        (0, None, False, 0),  # plan=true, or a command that is no job
        (0, {"status": "running", "exit_code": None}, True, 9),  # mpirun's 0 for a lost host
        (0, {"status": "running", "exit_code": None}, False, 9),
        (0, None, True, 9),
        (1, {"status": "interrupted", "exit_code": 75}, False, 75),
        (1, {"status": "failed", "exit_code": 8}, False, 8),
        (137, {"status": "running", "exit_code": None}, False, 137),
        (255, {"status": "running", "exit_code": None}, True, 9),
        (1, None, True, 9),
    ],
)
def test_an_attempt_that_lost_a_worker_has_not_succeeded(
    code: int, told: dict[str, object] | None, lost: bool, wanted: int
) -> None:
    assert entrypoint.verdict(code, json.dumps(told).encode() if told else None, lost=lost) == wanted


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sh", "-c", "exit 7"], 7, ""),
        (["launcher"], 5, "error: a launcher needs the command that it is to run"),
        (["launcher", "true"], 5, "which must be"),
        (["worker"], 5, "has no readable id_rsa"),
    ],
)
def test_roles_and_exit_codes(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    env = {**os.environ, "HOROVOD_JOBS_SSH_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", str(PATH), *arguments], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_arguments_alone_are_those_of_horovod_jobs(tmp_path: Path) -> None:
    stand_in = tmp_path / "horovod-jobs"
    stand_in.write_text('#!/bin/sh\necho "job: $*"\n')
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-I", str(PATH), "experiment=main", "a=b"],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        check=True,
    )
    assert done.stdout == "job: experiment=main a=b\n"


def test_sigterm_becomes_the_signal_that_asks_ranks_for_a_checkpoint(tmp_path: Path) -> None:
    """mpirun kills its ranks at SIGTERM; what a pod gets when it is deleted is SIGTERM."""
    child = f"trap 'echo usr1 > {tmp_path}/got; exit 75' USR1; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    script = f"import sys; sys.path.insert(0, {str(PATH.parent)!r}); import entrypoint as e; sys.exit(e.run_child(['sh', '-c', {child!r}]))"
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "got").read_text() == "usr1\n"


def test_ranks_are_the_children_of_open_mpis_daemon(tmp_path: Path) -> None:
    for pid, name, state, parent in (
        (1, "sshd", "S", 0),
        (7, "prted", "S", 1),
        (8, "python (x)", "R", 7),
        (9, "python", "Z", 7),
        (10, "sh", "S", 1),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) {state} {parent} 0 0")
    assert entrypoint.ranks_here(tmp_path) == [8]
