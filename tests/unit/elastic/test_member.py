"""A member alone: its ticket, its lease, and what it keeps when it begins anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from horovod_jobs.comm.member import VARIABLE, Ticket
from horovod_jobs.comm.signing import new_key
from horovod_jobs.launch.elastic.rendezvous import Rendezvous

KEY = new_key()


def ticket(port: int, **changes: object) -> bytes:
    made = Ticket(
        "member-1", KEY.hex(), "127.0.0.1", port, "localhost", "lo", 0.05, 0.6, 10, environment={"TOLD": "yes"}
    )
    return json.dumps({**asdict(made), **changes}).encode() + b"\n"


def run(
    code: str, *, port: int = 1, sent: bytes | None = None, close: bool = True
) -> tuple[subprocess.Popen[bytes], float]:
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, VARIABLE: "stdin"}, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(ticket(port) if sent is None else sent)
    process.stdin.flush()
    if close:
        process.stdin.close()
        process.stdin = None
    return process, time.monotonic()


TAKE = "from horovod_jobs.comm.member import take_ticket; import os, sys, time; m = take_ticket(); "


def test_a_ticket_is_read_from_standard_input() -> None:
    process, _ = run(
        TAKE + f"print(m.ticket.member, os.environ['TOLD'], os.environ.get('{VARIABLE}'), os.read(0, 9))",
        sent=ticket(1) + b"rest",
    )
    out, _ = process.communicate(timeout=20)
    assert out.decode().split("\n")[0] == "member-1 yes None b'rest'"


@pytest.mark.parametrize("sent", [b"", b"\n", b"[]\n", b'{"member": "m"}\n', b"cos\nsystem\n"])
def test_what_is_no_ticket_is_an_error_without_its_text(sent: bytes) -> None:
    process, _ = run(TAKE, sent=sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ranks of an elastic job are started by" in err.decode()


def test_a_member_that_reaches_nobody_ends_itself_within_its_lease() -> None:
    process, _ = run(TAKE + "m.start(asked=print); print('on', flush=True); time.sleep(60)", close=False)
    assert process.stdout is not None
    assert process.stdout.readline() == b"on\n"
    started = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 9
    assert 0.3 < time.monotonic() - started < 3
    assert b"no answer of the driver for 0.6 s" in err


def test_a_member_whose_driver_ends_is_asked_to_stop() -> None:
    process, _ = run(
        TAKE + "m.start(asked=lambda code: (print('asked', code, flush=True), os._exit(0))); time.sleep(60)", port=1
    )
    out, _ = process.communicate(timeout=20)
    assert out == b"asked 1\n"


def test_a_member_begins_anew_with_its_commits_and_numbers() -> None:
    """Twice: the second time the ticket comes from the process itself. Its standard input stays what it was."""
    asked: list[tuple[str, dict[str, object]]] = []

    def serve(member: str, path: str, values: dict[str, object]) -> dict[str, object]:
        asked.append((path, values))
        return {"stop": 0}

    served = Rendezvous("127.0.0.1", KEY, serve=serve, refused=lambda *told: asked.append(told))  # type: ignore[arg-type, func-returns-value]
    served.start()
    served.expect("member-1")
    module = (
        "import os, sys\n"
        "from horovod_jobs.comm.member import Kept, take_ticket\n"
        "def main():\n"
        "    m = take_ticket()\n"
        "    again = bool(m.commits)\n"
        "    m.client.ask('/beat', timeout_s=5, again=again)\n"
        "    if not again:\n"
        "        os.environ['HOROVOD_RANK'] = '1'\n"
        "        m.commits['stage'] = Kept('stage', 40, bytes(range(256)))\n"
        "        m.exec_again()\n"
        "    kept = m.commits['stage']\n"
        "    print(os.getpid(), kept.step, kept.data == bytes(range(256)), os.environ.get('HOROVOD_RANK'), os.read(0, 9))\n"
    )
    try:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as directory:
            # ``python -m horovod_jobs`` is what the process becomes: here a package of that name with another entry point.
            package = Path(directory) / "horovod_jobs"
            package.mkdir()
            package.joinpath("__init__.py").write_text(
                "import os\n__path__.append(os.path.join(os.environ['REAL'], 'horovod_jobs'))\n", encoding="utf-8"
            )
            package.joinpath("__main__.py").write_text(module + "main()\n", encoding="utf-8")
            root = Path(__file__).resolve().parents[3]
            process = subprocess.Popen(
                [sys.executable, "-m", "horovod_jobs"],
                cwd=directory,
                env={**os.environ, VARIABLE: "stdin", "REAL": str(root), "PYTHONPATH": directory},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            out, _ = process.communicate(ticket(served.port, lease_s=10) + b"more", timeout=20)
    finally:
        served.close()
    assert out.decode().split() == [str(process.pid), "40", "True", "None", "b'more'"]
    assert asked == [("/beat", {"again": False}), ("/beat", {"again": True})], (
        "nothing was refused: the numbers went on"
    )
