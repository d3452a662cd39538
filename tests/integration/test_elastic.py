"""Elastic jobs with real ranks: killed, replaced, grown; with strangers at the rendezvous. More of it is in tests/cluster."""

from __future__ import annotations

import http.client
import os
import pickle
import re
import signal
import time
from pathlib import Path

from tests.integration.elastic import (
    ELASTIC,
    EXACT,
    ROUNDED,
    at_epoch,
    events,
    hosts_script,
    nearly_equal,
    slowly,
    tell,
    tensors,
    told,
    world,
    worlds,
)
from tests.integration.support import (
    WORLD,
    Forks,
    Running,
    left_behind,
    processes,
    run,
    stage,
    start,
    valid_manifest,
    weights,
)


def listening(pid: int) -> list[tuple[str, int]]:
    """Addresses that a process listens on (IPv4)."""
    inodes = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            address, port = fields[1].split(":")
            found.append((".".join(str(byte) for byte in bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


def attack(running: Running) -> int:
    """What CVE-2024-10190 sends, and less; gives how many requests were refused."""
    ((address, port),) = listening(running.process.pid)
    assert address == "127.0.0.1", "the job's interface and no other"
    refused = 0
    for method, path in (
        ("PUT", "/runfunc/result"),
        ("PUT", "/store/0/global_/0"),
        ("GET", "/store/0/global_/0"),
        ("GET", "/"),
    ):
        connection = http.client.HTTPConnection(address, port, timeout=10)
        connection.request(method, path, body=pickle.dumps(os.getcwd) if method == "PUT" else None)
        refused += connection.getresponse().status == 403
        connection.close()
    return refused


def no_key_in_sight(running: Running) -> None:
    """No process of the job shows 32 bytes in hexadecimal on its command line or in its environment."""
    for pid in [*processes(running.mark)]:
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{pid}/{name}").read_bytes()
            assert re.search(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", shown) is None, name


def test_a_killed_rank_is_replaced_and_nothing_shows_in_the_weights(tmp_path: Path) -> None:
    """Rank 0, which writes everything, is killed outright; meanwhile strangers send what the rendezvous of Horovod would unpickle."""
    whole = tmp_path / "whole"
    whole.mkdir()
    done = run(*EXACT, slowly(0), *WORLD, cwd=whole)
    assert done.code == 0, done.text
    running = start(
        *EXACT, slowly(0.02), *ELASTIC, "launch.elastic.wait_s=60", "strategy.commit_every_steps=7", cwd=tmp_path
    )
    ranks = world(running, 0)
    at_epoch(running, 2)
    assert attack(running) == 4
    no_key_in_sight(running)
    os.kill(ranks[0], signal.SIGKILL)
    killed = time.monotonic()
    again = world(running, 1)
    assert time.monotonic() - killed < 30
    assert again[0] == ranks[1], "the survivor leads: it has the commits"
    assert again[1] not in ranks.values()
    done = running.wait()
    running.nothing_left()
    assert done.code == 0, done.text
    assert worlds(tmp_path) == [2, 2]
    assert {*weights(tmp_path).values()} == {*weights(whole).values()}, (
        "bit for bit those of a run that nobody disturbed"
    )
    resumed = [entry["step"] for entry in events(tmp_path, "resume")]
    assert resumed
    assert all(step % 7 == 0 and step >= 14 for step in resumed), (
        "there was no checkpoint on disk: it was a commit in memory"
    )
    manifest = valid_manifest(tmp_path)
    assert (manifest["status"], stage(manifest, "model")["metrics"]["steps"]) == ("done", 100)
    assert left_behind(tmp_path) == []
    assert len(told(tmp_path, "refused")) == 4
    assert "a request from 127.0.0.1 was refused: it is not signed" in done.err


def test_a_job_grows_loses_a_rank_and_shrinks(tmp_path: Path, forks: Forks) -> None:
    """One rank, then two; one of them is killed and not replaced; the weights are those of one rank, to rounding."""
    whole = tmp_path / "whole"
    whole.mkdir()
    done = forks.run(*ROUNDED, slowly(0), cwd=whole)
    assert done.code == 0, done.text
    hosts = tmp_path / "hosts"
    discovery = f"launch.elastic.discovery={hosts_script(hosts, 'localhost:1')}"
    running = start(*ROUNDED, slowly(0.05), *ELASTIC, discovery, "launch.elastic.cooldown_s=600", cwd=tmp_path)
    (first,) = world(running, 0).values()
    at_epoch(running, 1)
    tell(hosts, "localhost:2")
    grown = world(running, 1)
    assert grown[0] == first
    at_epoch(running, max(entry["epoch"] for entry in events(tmp_path, "epoch")) + 2)
    os.kill(grown[1], signal.SIGKILL)
    assert world(running, 2) == {0: first}
    done = running.wait()
    running.nothing_left()
    assert done.code == 0, done.text
    assert worlds(tmp_path) == [1, 2, 1]
    assert nearly_equal(tensors(tmp_path), tensors(whole))
    assert stage(valid_manifest(tmp_path), "model")["metrics"]["steps"] == 200
    (end,) = told(tmp_path, "end")
    assert end["losses"] == 1, "growing is none"
