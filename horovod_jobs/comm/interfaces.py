"""Which of this host's network interfaces leads to another host."""

from __future__ import annotations

import socket

from horovod_jobs.errors import SetupError


def own_address(interface: str | None, *, towards: str) -> tuple[str, str]:
    """This host's IPv4 address on the job's interface, and the interface: the one that is named, or the one that leads to a host.

    Raises:
        SetupError: there is no such interface, or it has no IPv4 address.
    """
    addresses = _addresses()
    if interface:
        if interface not in addresses:
            known = ", ".join(addresses)
            raise SetupError(f"launch.hosts.interface={interface} is not here with an IPv4 address; use one of {known}")
        return addresses[interface], interface
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))  # Sends nothing: the kernel chooses the way.
            chosen = str(probe.getsockname()[0])
    except OSError as error:
        raise SetupError(f"no way leads from this host to {towards!r} ({error}); set launch.hosts.interface") from error
    for name, address in addresses.items():
        if address == chosen and not chosen.startswith("127."):
            return address, name
    raise SetupError(
        f"{towards!r} is this host itself, so the job's interface is not known; set launch.hosts.interface"
    )


def loopback() -> str:
    """The name of the loopback interface; empty where it has none."""
    return next((name for name, address in _addresses().items() if address == "127.0.0.1"), "")


def _addresses() -> dict[str, str]:
    import psutil

    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family is socket.AF_INET
    }
