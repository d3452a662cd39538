"""Hosts in network namespaces: separate, shaped, reached by ssh and by both launchers, and gone afterwards whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks._network_runs import MIB, multiple
from benchmarks.hosts import Hosts, hosts, why_not
from benchmarks.network import measure_allreduce, measure_links, measure_server
from horovod_jobs.errors import SetupError

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
ROOT = Path(__file__).resolve().parents[2]
RATE = 50.0


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2, rate_mbit=RATE) as made:
        yield made


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody waits for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(what: Callable[[], bool], *, limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@needs_hosts
def test_hosts_have_names_and_processes_of_their_own_and_know_each_other(two: Hosts) -> None:
    done = two.run(["ssh", two.names[1], "hostname; cat /proc/1/comm"])
    assert done.stdout.split() == [two.names[1], "sshd"]
    assert two.run(["sh", "-c", "hostname; exit 3"]).returncode == 3
    assert two.run(["cat", "/etc/hosts"], host=1).stdout.splitlines()[1:] == [
        f"{address} {name}" for address, name in zip(two.addresses, two.names, strict=True)
    ]


@needs_hosts
def test_nothing_is_added_outside_the_hosts(two: Hosts) -> None:
    outside = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    assert two.addresses[0] not in outside
    assert two.names[0] not in Path("/etc/hosts").read_text()
    assert not list(Path("/etc/netns").glob("hj*")) if Path("/etc/netns").exists() else True


@needs_hosts
def test_links_carry_what_they_are_shaped_to(two: Hosts) -> None:
    # Payload is 1448 of the 1514 bytes of a frame; the lower limit leaves room for a machine that is busy otherwise.
    carried = measure_links(two, count=2, seconds=2.0) * 8 / 1e6
    assert 0.5 * RATE < carried < RATE


@needs_hosts
@pytest.mark.parametrize("servers", [0, 1])
def test_mpi_messages_take_the_shaped_link(two: Hosts, servers: int) -> None:
    # measure_server fails if a sum is wrong. Shared memory, or any way round the link, would take a hundredth of the bound.
    (run,) = measure_server(two, workers=2 - servers, servers=servers, rate_mbit=RATE, sizes=[MIB], blocks=2)
    # Pulls may overlap pushes with a server of its own, hence half.
    assert (multiple(run) or 0) > (0.45 if servers else 0.9)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("method", ["Gloo", "MPI ring"])
def test_horovod_runs_over_hosts(two: Hosts, method: str) -> None:
    (run,) = measure_allreduce(two, method, count=2, rate_mbit=RATE, sizes=[MIB], blocks=1, compression=("none",))
    assert (multiple(run) or 0) > 0.9


@needs_hosts
def test_a_cut_host_is_not_reached_until_its_cable_is_mended(two: Hosts) -> None:
    ask = ["ssh", "-o", "ConnectTimeout=1", two.names[1], "true"]
    two.cut(1)
    try:
        assert two.run(ask).returncode == 255
    finally:
        two.mend(1)
    assert two.run(["ssh", "-o", "ConnectTimeout=10", two.names[1], "true"]).returncode == 0


@needs_hosts
def test_a_command_is_ended_after_its_time(two: Hosts) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        two.run(["sleep", "1000"], timeout_s=0.5)
    assert eventually(
        lambda: "sleep 1000" not in two.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo"]).stdout
    )


_MAKER = """
import signal, sys, time
from benchmarks.hosts import hosts
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs, continuous integration among them, ignore it.
with hosts(2) as made:
    made.start(["sleep", "1000"], host=1)
    made.run(["ssh", made.names[1], "nohup sleep 1000 >/dev/null 2>&1 &"])
    print(made.directory, *[pid for pid in made._inside.values()], flush=True)
    time.sleep(1000)
"""


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_is_gone_with_the_process_that_made_it(number: signal.Signals) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert maker.stdout is not None
    directory, *pids = maker.stdout.readline().split()
    inside = [int(pid) for pid in pids]
    assert len(inside) == 3
    assert not any(gone(pid) for pid in inside)
    network = os.readlink(f"/proc/{inside[1]}/ns/net")
    maker.send_signal(number)
    maker.wait(timeout=20)
    maker.stdout.close()
    # Every process of the host: those that were left in the background by ssh as well.
    assert eventually(lambda: all(gone(pid) for pid in inside) and not _members(network))
    if number is signal.SIGINT:
        assert not Path(directory).exists()
    with hosts(1):  # The next one clears what a killed one left in the temporary directory.
        assert not Path(directory).exists()


def _members(network: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns/net") == network and not gone(int(path.name)):
                found.append(path.name)
        except OSError:
            continue
    return found


@needs_hosts
def test_an_error_inside_ends_them_as_well() -> None:
    with pytest.raises(RuntimeError, match="inside"), hosts(1) as made:
        directory, pid = made.directory, next(iter(made._inside.values()))
        raise RuntimeError("inside")
    assert gone(pid)
    assert not directory.exists()


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="need root"), hosts(2):
        pass


@needs_hosts
def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.hosts.find", lambda name: None if name == "sshd" else name)
    with pytest.raises(SetupError, match="sshd is not installed; .* openssh-server"), hosts(2):
        pass
