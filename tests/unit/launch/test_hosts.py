"""What is started over hosts, how hosts are read, and what answers of hosts amount to; nothing is started."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs.config import HostsConfig, LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch.hosts.checks import Checked
from horovod_jobs.launch.hosts.judging import COLUMNS, PACKAGES, Answer, Wanted, judge, network_of, raise_if_bad
from horovod_jobs.launch.hosts.plan import Slots, _stations, count, filled, named_hosts, over, plan_job, ssh_options
from horovod_jobs.launch.hosts.station import Store
from horovod_jobs.launch.starting import shown
from tests.unit.launch.support_launch import ENVIRON, HOST, golden, job

TWO = HostsConfig(list=["a:4", "b:4"])


def launch(**changes: Any) -> LaunchConfig:
    return LaunchConfig(**{"kind": "hosts", "np": 8, "hosts": TWO, **changes})


def planned(config: LaunchConfig) -> Any:
    return plan_job(config, job=job(), host=HOST, environ=ENVIRON)


@pytest.mark.parametrize(
    ("has_ulfm", "outlives", "told"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_mpi_is_told_to_bear_losses_where_it_can_and_the_job_does(has_ulfm: bool, outlives: bool, told: bool) -> None:
    made = plan_job(
        launch(controller="mpi"),
        job=replace(job(), outlives_ranks=outlives),
        host=replace(HOST, has_ulfm=has_ulfm),
        environ=ENVIRON,
    )
    assert ("--with-ft" in made.argv) == told


# --- which hosts ---------------------------------------------------------------------------------------------------------
def test_both_forms_of_a_host_file_and_the_list(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the rack on the left\n a slots=4  # two sockets\n\nb:2\nc.example.org\na:1\n")
    wanted = (Slots("a", 5), Slots("b", 2), Slots("c.example.org", 1))
    assert named_hosts(HostsConfig(file=str(path))) == wanted
    assert named_hosts(HostsConfig(list=["a:4", "b slots=2", "c.example.org", "a:1"])) == wanted
    assert count(launch(hosts=HostsConfig(file=str(path)))) == 8
    assert named_hosts(HostsConfig()) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c", "launch.hosts.list: 'a b c' is not a host; write HOST:SLOTS"),
        ("-oProxyCommand=evil", "is not a host"),  # must not become an option of ssh
        ("a:0", "'a:0' has no slot; give it 1 or more"),
        ("a:x", "is not a host"),
        ("a;reboot", "is not a host"),
    ],
)
def test_what_is_no_host_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named_hosts(HostsConfig(list=[text]))


def test_a_host_file_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a:4\nb slots=\n")
    with pytest.raises(ConfigError, match=f"{path}:2: 'b slots=' is not a host"):
        named_hosts(HostsConfig(file=str(path)))
    with pytest.raises(ConfigError, match="launch.hosts.file=.*gone cannot be read"):
        named_hosts(HostsConfig(file=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="both name hosts; use one of them"):
        named_hosts(HostsConfig(list=["a"], file=str(path)))


def test_hosts_are_filled_in_order() -> None:
    both = (Slots("a", 4), Slots("b", 4))
    assert filled(both, ranks=8) == both
    assert filled(both, ranks=5) == (Slots("a", 4), Slots("b", 1))
    assert filled(both, ranks=3) == (Slots("a", 3),)
    with pytest.raises(ConfigError, match="launch.np=9 does not fit the 8 slots of a:4, b:4; use 1 to 8"):
        filled(both, ranks=9)
    with pytest.raises(ConfigError, match="names no hosts; add launch.hosts.list"):
        filled((), ranks=0)


# --- what is started -----------------------------------------------------------------------------------------------------
def test_the_mpi_command() -> None:
    golden("hosts_mpi.txt", shown(planned(launch(env=["MY_TOKEN"]))) + "\n")


def test_what_a_host_is_told_for_gloo() -> None:
    golden("hosts_gloo.txt", shown(planned(launch(controller="gloo", np=5, env=["MY_TOKEN"]))) + "\n")


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_only_named_variables_travel_and_no_value_is_shown(controller: str) -> None:
    made = planned(launch(controller=controller, env=["MY_TOKEN"]))
    assert "MY_TOKEN" in made.named
    assert not {"AWS_SECRET_ACCESS_KEY", "HOSTNAME", "TMPDIR", "HOME"} & set(made.named)
    assert "AWS_SECRET_ACCESS_KEY" not in made.env
    assert "hidden-value" not in shown(made)
    assert "OMP_NUM_THREADS" not in made.env, "each host shares out its own cores"
    assert planned(launch(controller=controller, threads=3)).env["OMP_NUM_THREADS"] == "3"


def test_the_network_is_what_the_checks_found_or_what_the_user_named() -> None:
    made = planned(launch())
    assert "btl_tcp_if_include" not in made.argv
    kept = over(launch(), made, networks=["10.0.0.0/24", "10.0.1.0/24"]).argv
    assert kept[kept.index("btl_tcp_if_include") + 1] == "10.0.0.0/24,10.0.1.0/24"
    assert kept[kept.index("prte_if_include") + 1] == "10.0.0.0/24,10.0.1.0/24"
    at = kept.index("btl_tcp_if_include") - 1
    assert [*kept[:at], *kept[at + 6 :]] == made.argv, "nothing else changes"
    own = launch(hosts=replace(TWO, interface="ib0"))
    named = planned(own)
    assert named.argv[named.argv.index("btl_tcp_if_include") + 1] == "ib0"
    assert over(own, named, networks=["10.0.0.0/24"]) == named


def test_host_keys_are_checked_unless_the_user_says_otherwise() -> None:
    assert "StrictHostKeyChecking=yes" in ssh_options(TWO)
    loose = ssh_options(replace(TWO, check_host_keys=False))
    assert "StrictHostKeyChecking=no" in loose
    assert {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=3"} <= set(loose)


def test_every_rank_of_gloo_knows_its_place() -> None:
    config = launch(controller="gloo", np=5, hosts=HostsConfig(list=["a:2", "b:1", "c:2"]))
    checked = Checked(frozenset({"a"}), True, {"a": "eth0", "b": "ens3", "c": "eth0"}, ())
    stations = _stations(config, planned(config), checked)
    keys = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GLOO_IFACE")
    rows = [tuple(entry[f"HOROVOD_{key}"] for key in keys) for one in stations for entry in one.ranks]
    assert rows == [
        ("0", "0", "2", "0", "3", "eth0"),
        ("1", "1", "2", "0", "2", "eth0"),
        ("2", "0", "1", "1", "3", "ens3"),
        ("3", "0", "2", "2", "3", "eth0"),
        ("4", "1", "2", "1", "2", "eth0"),
    ]
    assert [one.here for one in stations] == [True, False, False]
    assert stations[0].reach == ["/venv/bin/python"]
    assert stations[1].reach[0] == "ssh"
    assert "HOME" not in stations[1].env


def test_what_is_missing_here_is_said() -> None:
    with pytest.raises(SetupError, match="needs Horovod, which is not installed"):
        plan_job(launch(), job=job(), host=replace(HOST, has_horovod=False), environ=ENVIRON)
    with pytest.raises(SetupError, match="launch.controller=mpi needs mpi4py"):
        plan_job(launch(controller="mpi"), job=job(), host=replace(HOST, has_mpi4py=False), environ=ENVIRON)
    assert plan_job(launch(), job=job(), host=replace(HOST, mpirun=None), environ=ENVIRON).controller == "gloo"


# --- what Gloo's ranks tell each other -----------------------------------------------------------------------------------
def test_a_scope_is_kept_until_every_rank_has_given_it_up() -> None:
    store = Store()
    for rank in "012":
        store.put("global", rank, b"address " + rank.encode())
    store.give_up("global", "0")
    store.give_up("global", "2")
    assert store.get("global", "0") == b"address 0", "rank 1 may still have to read it"
    store.give_up("global", "1")
    assert store.get("global", "0") is None
    store.put("global", "0", b"again")
    assert store.get("global", "0") == b"again"
    assert store.get("other", "0") is None


# --- judging the answers -------------------------------------------------------------------------------------------------
VERSIONS = {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")}
MINE = {"versions": VERSIONS, "package": {"digest": "d0", "place": "/p"}}
WANTED = Wanted(hosts=("a", "b"), ssh=("ssh",), python="/venv/bin/python", path="", directories=("/s/runs", "/s/artifacts"),
                interface=None, clock_limit_s=5.0, disk_free_mb=1000, timeout_s=10.0)  # fmt: skip


def answer(peer: str, address: str, **changes: Any) -> Answer:
    """A host on which all is well, but for ``changes`` of its first answer or its second."""
    number = "1" if peer == "b" else "2"
    first = {"host": "x", "working_directory": True, "versions": dict(VERSIONS), "package": dict(MINE["package"]), "errors": {},
             "free_mb": {"/s/runs": 5000, "/s/artifacts": 5000}, "interfaces": ["lo", "eth0"], "cores": 8}  # fmt: skip
    second = {"reach": {peer: {"address": address, "from": f"10.0.0.{number}"}}, "see": {"/s/runs": None, "/s/artifacts": None},
              "addresses": [["lo", "127.0.0.1", "255.0.0.0"], ["eth0", f"10.0.0.{number}", "255.255.255.0"]]}  # fmt: skip
    ahead_s = changes.pop("ahead_s", 0.1)
    for key, value in changes.items():
        (first if key in first else second)[key] = value
    return Answer(first=first, second=second, ahead_s=ahead_s)


def fault(b: Answer, wanted: Wanted = WANTED) -> str:
    """The error where host b answers so and host a is well."""
    findings = judge(wanted, {"a": answer("b", "10.0.0.2"), "b": b}, mine=MINE)
    assert not [one for one in findings if one.host == "a" and one.remedy]
    with pytest.raises(SetupError) as caught:
        raise_if_bad(findings)
    return str(caught.value)


def test_hosts_on_which_all_is_well() -> None:
    answers = {"a": answer("b", "10.0.0.2"), "b": answer("a", "10.0.0.1")}
    findings = judge(WANTED, answers, mine=MINE)
    raise_if_bad(findings)
    assert [(one.host, one.what) for one in findings] == [(host, what) for host in "ab" for what in COLUMNS]
    assert network_of(answers, named=None) == ({"a": "eth0", "b": "eth0"}, ("10.0.0.0/24",))


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (Answer(error="ssh: Could not resolve hostname b: Name not known"), "^host b: ssh: Could not .* correct the name"),
        (Answer(error="Host key verification failed."), "host b: ssh: Host key .* launch.hosts.check_host_keys=false"),
        (Answer(error="me@b: Permission denied (publickey)."), "host b: ssh: .*ssh-copy-id b"),
        (Answer(error="ssh: connect to host b port 22: Connection timed out"), "^host b: ssh: connect to .* see that the host is up"),
        (Answer(error="bash: /venv/bin/python: No such file or directory"), "host b: ssh: .* the same path"),
        (answer("a", "10.0.0.1", versions={**VERSIONS, "torch": "0.9"}), "host b: torch: 0.9, here 1.0; install the same"),
        (answer("a", "10.0.0.1", versions={**VERSIONS, "horovod": None}), "host b: horovod: missing, here 1.0"),
        (answer("a", "10.0.0.1", versions={**VERSIONS, "python": "3.12.1"}), "host b: python: 3.12.1, here 3.11.7"),
        (answer("a", "10.0.0.1", versions={**VERSIONS, "mpi4py": "0"}), "host b: others: mpi4py 0, here 1.0"),
        (answer("a", "10.0.0.1", package=None), "host b: package: missing; horovod_jobs is not importable"),
        (answer("a", "10.0.0.1", package={"digest": "d1", "place": "/q"}), "host b: package: other code in /q"),
        (answer("a", "10.0.0.1", reach={"a": {"name_error": "unknown"}}), "host b: name: does not resolve a .unknown."),
        (answer("a", "10.0.0.1", reach={"a": {"address": "10.0.0.1", "port_error": "timed out"}}),
         "host b: ports: does not reach a at 10.0.0.1 .timed out."),
        (answer("a", "10.0.0.1", ahead_s=-7.0), "host b: clock: -7.0 s; more than launch.hosts.clock_limit_s=5"),
        (answer("a", "10.0.0.1", free_mb={"/s/runs": 5000, "/s/artifacts": 12}), "host b: disk: 0.0 GB; less than"),
        (answer("a", "10.0.0.1", see={"/s/runs": "not the first host's", "/s/artifacts": None}),
         "host b: directories: /s/runs: not the first host's; run.root, run.store .* all hosts share"),
        (answer("a", "10.0.0.1", working_directory=False), "host b: directories: .* is not there"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_host_value_and_remedy(b: Answer, message: str) -> None:
    assert re.search(message, fault(b))


def test_several_faults_are_counted_and_an_interface_is_looked_for() -> None:
    both = answer("a", "10.0.0.1", ahead_s=9.0, versions={**VERSIONS, "torch": "0.9"})
    assert fault(both).endswith("(1 more in the table)")
    assert "host b: network: no ib0 (eth0, lo); correct launch.hosts.interface" in _no_interface()


def _no_interface() -> str:
    answers = {
        "a": answer("b", "10.0.0.2", interfaces=["ib0", "lo"]),
        "b": answer("a", "10.0.0.1", interfaces=["eth0", "lo"]),
    }
    with pytest.raises(SetupError) as caught:
        raise_if_bad(judge(replace(WANTED, interface="ib0"), answers, mine=MINE))
    return str(caught.value)
