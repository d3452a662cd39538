"""What a host tells of itself before a job starts. Its text is sent to the host by ssh and run there: the standard library only.

It reads two lines of JSON and answers each with one. The first asks what there is here and opens a port; the second names the
other hosts' ports and asks which of them can be reached. It ends, and takes away what it made, when its input ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def package_digest(name: str) -> dict[str, str] | None:
    """SHA-256 over the package's Python files, and where it lies; None where it is not found."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            root, digest = pathlib.Path(spec.origin).parent, hashlib.sha256()
            for path in sorted(root.rglob("*.py")):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
            return {"digest": digest.hexdigest(), "place": str(root)}
    return None


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Distribution name to version, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def look(order: Mapping[str, Any]) -> dict[str, Any]:
    """The first answer: versions, clock, disk, and on the first host the directories with a mark in each."""
    errors: dict[str, str] = {}
    free: dict[str, int] = {}
    for path in order["directories"]:
        try:
            if order["first"]:
                os.makedirs(path, exist_ok=True)
                mark(path, order["mark"])
            standing = path
            while not os.path.isdir(standing) and standing != os.path.dirname(standing):
                standing = os.path.dirname(standing)
            free[path] = shutil.disk_usage(standing).free // 1000000
        except OSError as error:
            errors[path] = str(error)
    return {
        "host": socket.gethostname(),
        "working_directory": os.path.isdir(order["cwd"]),
        "versions": versions(order["packages"]),
        "package": package_digest(order["package"]),
        "free_mb": free,
        "errors": errors,
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "time": time.time(),
    }


def mark(path: str, name: str) -> None:
    """Leave an empty file that the other hosts look for."""
    with open(os.path.join(path, name), "x"):
        pass


def see(order: Mapping[str, Any]) -> dict[str, str | None]:
    """For each directory what keeps this host from using it as the first host does, or None."""
    found: dict[str, str | None] = {}
    for path in order["directories"]:
        mine = f"{order['mark']}-{socket.gethostname()}-{os.getpid()}"
        try:
            if not os.path.exists(os.path.join(path, order["mark"])):
                found[path] = "not the first host's"
                continue
            mark(path, mine)
            os.unlink(os.path.join(path, mine))
            found[path] = None
        except OSError as error:
            found[path] = str(error)
    return found


def reach(peers: Mapping[str, int], timeout_s: float) -> dict[str, dict[str, str]]:
    """For each other host its address and the address it is reached from, or what is wrong with its name or its port."""
    found: dict[str, dict[str, str]] = {}
    for name, port in peers.items():
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(name, port, socket.AF_INET, socket.SOCK_STREAM)[0]
        except OSError as error:
            found[name] = {"name_error": str(error)}
            continue
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(timeout_s)
                probe.connect(address)
                found[name] = {"address": str(address[0]), "from": probe.getsockname()[0]}
        except OSError as error:
            found[name] = {"address": str(address[0]), "port_error": str(error)}
    return found


def addresses() -> list[list[str | None]]:
    """Every IPv4 address of this host: [interface, address, netmask]. Empty where psutil is missing."""
    with contextlib.suppress(ImportError):
        import psutil

        return [
            [name, entry.address, entry.netmask]
            for name, entries in psutil.net_if_addrs().items()
            for entry in entries
            if entry.family == socket.AF_INET
        ]
    return []


def main(order: Mapping[str, Any]) -> None:
    """Answer the two questions."""
    sys.path[:0] = [order["cwd"], *filter(None, order["path"].split(os.pathsep))]  # As python -m has it.
    with socket.create_server(("0.0.0.0", 0)) as listening:
        try:
            print(json.dumps({**look(order), "port": listening.getsockname()[1]}), flush=True)
            line = sys.stdin.readline()
            if line:
                peers = json.loads(line)["peers"]
                answer = {"reach": reach(peers, order["timeout_s"]), "see": see(order), "addresses": addresses()}
                print(json.dumps(answer), flush=True)
                sys.stdin.readline()  # Others may still want to reach this host: wait for the end.
        finally:
            if order["first"]:
                for path in order["directories"]:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(path, order["mark"]))


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
