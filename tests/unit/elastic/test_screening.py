"""Hosts of an elastic job are looked at before ranks start there; one that cannot work is left out until it can."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.elastic.screening import Screened
from horovod_jobs.launch.hosts.judging import Finding


class Cluster:
    """Hosts, what is wrong with them, and a clock. It is its own discovery."""

    def __init__(self, *, alone: bool = False, **faults: str) -> None:
        self.now = 0.0
        self.faults = faults  # host -> what is wrong; empty where all is well
        self.looks: list[list[str]] = []
        self.told: list[tuple[str, str]] = []
        self.screened = Screened(
            self,
            look=self.look,
            fault=lambda host, why: self.told.append((host, why)),
            alone=alone,
            again_s=4,
            clock=lambda: self.now,
        )

    def find(self) -> dict[str, int]:
        return dict.fromkeys(self.faults, 2)

    def look(self, hosts: Sequence[str]) -> list[Finding]:
        self.looks.append(list(hosts))
        here = {socket.gethostname(): "localhost"}
        found = [(host, self.faults[here.get(host, host)].partition(" ")) for host in hosts]
        return [
            Finding(host, what or "ssh", value, f"mend {host}" if value else "") for host, (what, _, value) in found
        ]

    def after(self, seconds: float) -> list[str]:
        """Hosts that can be used once the looks that are due then are done."""
        self.now += seconds
        self.screened.find()
        self.screened.wait()
        return list(self.screened.find())


def test_a_host_that_is_not_reached_is_named_and_the_others_begin_without_it() -> None:
    cluster = Cluster(a="", b="ssh connection refused", c="")
    assert cluster.screened.find() == {"a": 2, "c": 2}
    assert cluster.told == [("b", "ssh: connection refused; mend b")]


def test_the_others_are_not_held_to_a_first_host_that_is_silent() -> None:
    cluster = Cluster(alone=True, a="ssh refused", b="ssh refused", c="", d="disk full")
    assert cluster.screened.find() == {"c": 2}
    assert cluster.looks == [["a", "b", "c", "d"], ["c", "d"]]
    assert [host for host, _ in cluster.told] == ["a", "b", "d"]


def test_it_joins_once_it_can_and_is_told_of_once_until_then() -> None:
    cluster = Cluster(a="", b="ssh connection refused")
    looks = []
    for seconds in (0, 1, 1, 3, 1, 3, 1):  # looked at again after 2 s, and then every 4 s
        assert cluster.after(seconds) == ["a"]
        looks.append(len(cluster.looks))
    assert looks == [1, 1, 2, 2, 3, 3, 4]
    assert len(cluster.told) == 1
    cluster.faults["b"] = "torch 1.0, here 2.0"
    assert cluster.after(4) == ["a"]
    assert cluster.told[1] == ("b", "torch: 1.0, here 2.0; mend b")
    cluster.faults["b"] = ""
    assert cluster.after(4) == ["a", "b"]


def test_a_host_that_comes_later_is_looked_at_beside_one_that_is_good() -> None:
    cluster = Cluster(a="", b="")
    assert cluster.after(0) == ["a", "b"]
    cluster.faults |= {"c": "", "d": "disk 0 GB"}
    assert cluster.after(1) == ["a", "b", "c"]
    assert cluster.looks == [["a", "b"], ["a", "c", "d"]]
    assert cluster.after(1) == ["a", "b", "c"]
    assert len(cluster.looks) == 2, "who is good is not looked at again"


def test_a_good_host_that_falls_silent_keeps_its_ranks_and_is_no_measure_any_more() -> None:
    cluster = Cluster(a="", b="", c="ssh no route")
    assert cluster.after(0) == ["a", "b"]
    cluster.faults["a"] = "ssh no route"
    assert cluster.after(4) == ["a", "b"]
    assert cluster.after(4) == ["a", "b"]
    assert cluster.looks[1:] == [["a", "c"], ["b", "c"]]
    assert [host for host, _ in cluster.told] == ["c"]


def test_a_host_that_went_and_came_back_is_looked_at_again() -> None:
    cluster = Cluster(a="", b="")
    cluster.after(0)
    del cluster.faults["b"]
    assert cluster.after(1) == ["a"]
    cluster.faults["b"] = "package other code in /opt"
    assert cluster.after(1) == ["a"]
    assert cluster.told == [("b", "package: other code in /opt; mend b")]


def test_names_that_do_not_resolve_are_no_fault_and_localhost_is_looked_at_by_its_own_name() -> None:
    cluster = Cluster(localhost="name does not resolve x", b="")
    assert cluster.after(0) == ["localhost", "b"]
    assert cluster.looks == [[socket.gethostname(), "b"]]


def test_where_no_host_can_ever_work_that_is_the_end_and_otherwise_it_is_waited_for() -> None:
    with pytest.raises(
        SetupError, match=r"^host a: ssh: refused; mend a \(none of the 2 hosts can be used, see above\)$"
    ):
        Cluster(alone=True, a="ssh refused", b="ssh refused").screened.find()
    assert Cluster(alone=True, a="ssh refused", b="").after(0) == ["b"]
    cluster = Cluster(a="ssh refused")
    assert cluster.after(0) == []
    cluster.faults["a"] = ""
    assert cluster.after(4) == ["a"]


def test_an_ssh_that_is_not_there_is_every_host_s_fault() -> None:
    cluster = Cluster(a="", b="")

    def look(hosts: Sequence[str]) -> list[Finding]:
        raise SetupError("ssh cannot be started; install openssh-client")

    cluster.screened._look = look
    assert cluster.after(0) == []
    assert [host for host, _ in cluster.told] == ["a", "b"]
    assert "install openssh-client" in cluster.told[0][1]
