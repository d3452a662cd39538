"""What the hosts of ``benchmarks.hosts`` start with: scripts of their first processes, sshd's files, and where programs are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The first process of a host: make its private parts, say so, and become sshd, which also reaps what its commands leave.
HOLD = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
if [ -d "$HOME/.ssh" ]; then mount -t tmpfs tmpfs "$HOME/.ssh"; fi
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true
ip link set lo up
touch "$2/ready-$1"
exec "$3" -D -e -f /etc/ssh/sshd_config
"""
SWITCH = """
set -e
ip link add br0 type bridge
ip link set br0 up
touch "$2/ready-$1"
exec sleep infinity
"""
_SSHD = """Port 22
ListenAddress 0.0.0.0
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
StrictModes no
MaxStartups 100
"""
_SSH = """Host *
  IdentityFile /etc/ssh/client_key
  IdentitiesOnly yes
  UserKnownHostsFile /etc/ssh/known_hosts
  GlobalKnownHostsFile /etc/ssh/known_hosts
  BatchMode yes
  LogLevel ERROR
"""


def search_path() -> str:
    """Where programs are looked for: beside this Python, in the path, and in the directories that only root has in it."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def find(name: str) -> str | None:
    """Where a program is; None where it is not."""
    return shutil.which(name, path=search_path())


def program(name: str) -> str:
    """Its path, or its name where it is not found: starting it then says so."""
    return find(name) or name


def write_files(directory: Path, names: Sequence[str], addresses: Sequence[str]) -> None:
    """The directory that every host sees as ``/etc/ssh``, and the one ``/etc/hosts``; the keys serve these hosts only."""
    ssh = directory / "ssh"
    ssh.mkdir(mode=0o755)
    for key in ("host_key", "client_key"):
        subprocess.run(
            [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(ssh / key)], check=True
        )
    (ssh / "authorized_keys").write_text((ssh / "client_key.pub").read_text())
    known = " ".join((ssh / "host_key.pub").read_text().split()[:2])
    (ssh / "known_hosts").write_text(f"{','.join([*names, *addresses])} {known}\n")
    (ssh / "sshd_config").write_text(_SSHD)
    (ssh / "ssh_config").write_text(_SSH)
    lines = [f"{address} {name}" for name, address in zip(names, addresses, strict=True)]
    (directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
