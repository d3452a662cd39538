"""Hosts that are network namespaces of this machine, with links of a chosen speed: ``with hosts(4, rate_mbit=1000) as made:``.

Each host has a network, a host name, process ids and shared memory of its own, and an sshd on port 22 that knows the other
hosts' keys; file systems are shared, as by NFS. A switch (a bridge in one more namespace) joins them. Both ends of each link are
shaped by a token bucket, so that a host sends and receives at the rate at the same time, as a full-duplex port does.

Nothing is named outside the namespaces: no interface, no address, no file in ``/etc``. The first process of a host holds it, and
the kernel ends that process with the one that made it, whatever ended that. With it go all processes of the host, and the
namespaces with the last of them. Linux, root, ``ip``, ``tc``, ``sshd`` and util-linux 2.34 or newer are needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks._host_files import HOLD, SWITCH, find, program, search_path, write_files
from benchmarks.common import die_with_parent
from horovod_jobs.errors import SetupError

_PREFIX = "horovod-jobs-hosts-"
_START_LIMIT_S = 30.0
_QUEUE_BYTES = 512 * 1024  # A small switch's buffer for a port: 4 ms at 1 Gbit/s.
_BUCKET_BYTES = 64 * 1024
_NEEDED = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter", "setpriv", "mount")


def why_not() -> str | None:
    """Why hosts cannot be made here, in a sentence; None where they can."""
    if not sys.platform.startswith("linux"):
        return f"hosts are Linux network namespaces, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root; run this as root, in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN if need be"
    if missing := [name for name in _NEEDED if find(name) is None]:
        return (
            f"{', '.join(missing)} is not installed; on Debian: apt-get install iproute2 openssh-server openssh-client "
            "util-linux mount"
        )
    return None


class Hosts:
    """Running hosts; ``hosts`` makes and ends them.

    Attributes:
        names: host names; they resolve on every host.
        addresses: IPv4 addresses, in the same order.
        interface: the name of every host's interface.
    """

    interface = "eth0"

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        self.names = tuple(names)
        self.addresses = tuple(f"10.77.0.{number + 1}" for number in range(len(names)))
        self.directory = directory
        self._holders: list[subprocess.Popen[bytes]] = []
        self._inside: dict[str, int] = {}  # a host's first process; the switch's holder

    # --- what a test or a benchmark does with them ----------------------------------------------------------------------
    def start(
        self, argv: Sequence[str], *, host: int = 0, env: Mapping[str, str] | None = None, output: int | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in the current working directory. It gets SIGTERM when the returned process has ended."""
        command = [*self._enter(self.names[host]), "env", "-C", os.getcwd(), "setpriv", "--pdeathsig", "TERM", *argv]
        return subprocess.Popen(
            command,
            env=dict(os.environ if env is None else env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output == subprocess.PIPE else None,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def run(
        self, argv: Sequence[str], *, host: int = 0, env: Mapping[str, str] | None = None, timeout_s: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; its output, both streams together, is in ``stdout``.

        Raises:
            subprocess.TimeoutExpired: it was ended after ``timeout_s``.
        """
        process = self.start(argv, host=host, env=env, output=subprocess.PIPE)
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            raise
        return subprocess.CompletedProcess(list(argv), process.returncode, text, "")

    def mpirun(self, *, hosts: Sequence[int] | None = None, ranks_per_host: int = 1) -> list[str]:
        """``mpirun`` over these hosts by ssh, to be started on the first of them; options and the command follow.

        Ranks of different hosts talk by TCP on the hosts' own interface. Shared memory is there where a host has several ranks.
        """
        btl = "tcp,self" if ranks_per_host == 1 else "tcp,sm,self"
        return [*self._over("mpirun", hosts, ranks_per_host), "--map-by", "slot", "--bind-to", "none",
                "--mca", "pml", "ob1", "--mca", "btl", btl, "--mca", "btl_tcp_if_include", self.interface,
                "--prtemca", "prte_if_include", self.interface, "--prtemca", "oob_tcp_if_include", self.interface]  # fmt: skip

    def horovodrun(self, *, hosts: Sequence[int] | None = None, ranks_per_host: int = 1) -> list[str]:
        """``horovodrun --gloo`` over these hosts by ssh, to be started on the first of them."""
        over = self._over("horovodrun", hosts, ranks_per_host)
        return [*over, "--gloo", "--disable-cache", "--network-interfaces", self.interface]

    def _over(self, launcher: str, hosts: Sequence[int] | None, ranks_per_host: int) -> list[str]:
        chosen = [self.names[index] for index in (range(len(self.names)) if hosts is None else hosts)]
        listed = ",".join(f"{name}:{ranks_per_host}" for name in chosen)
        return [program(launcher), "-np", str(len(chosen) * ranks_per_host), "-H", listed]

    def set_rate(self, rate_mbit: float | None) -> None:
        """Shape both ends of every link to ``rate_mbit``; None: as fast as the machine."""
        for index, name in enumerate(self.names):
            for place, device in ((name, self.interface), ("switch", f"port{index}")):
                self._in(place, "tc", "qdisc", "del", "dev", device, "root", check=False)
                if rate_mbit is not None:
                    # The bucket must hold 0.5 ms as well, so that a late timer loses nothing.
                    bucket = max(_BUCKET_BYTES, int(rate_mbit * 1e6 / 8 * 0.0005))
                    self._in(place, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{rate_mbit}mbit",
                             "burst", str(bucket), "limit", str(_QUEUE_BYTES + bucket))  # fmt: skip

    def cut(self, host: int) -> None:
        """Pull a host's cable: nothing arrives and nobody is told."""
        self._in("switch", "ip", "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put the cable back."""
        self._in("switch", "ip", "link", "set", f"port{host}", "up")

    # --- making and ending them -----------------------------------------------------------------------------------------
    def hold(self, name: str, script: str) -> None:
        """Start the first process of a host or of the switch and wait until its private parts are there."""
        separate = ["--net"] if name == "switch" else ["--net", "--uts", "--ipc", "--mount", "--mount-proc"]
        command = [program("unshare"), *separate, "--pid", "--fork", "--kill-child=KILL",
                   "sh", "-c", script, "sh", name, str(self.directory), program("sshd")]  # fmt: skip
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            holder = subprocess.Popen(
                command,
                env={"PATH": search_path(), "HOME": str(Path.home())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._holders.append(holder)
        deadline = time.monotonic() + _START_LIMIT_S
        while not (self.directory / f"ready-{name}").exists():
            if holder.poll() is not None or time.monotonic() > deadline:
                raise SetupError(f"host {name} did not start: {log.read_text().strip() or 'no message'}; {_REMEDY}")
            time.sleep(0.01)
        self._inside[name] = holder.pid if name == "switch" else _children(holder)[0]

    def join(self, index: int) -> None:
        """Plug a host into the switch."""
        name, port = self.names[index], f"port{index}"
        self._in("switch", "ip", "link", "add", port, "type", "veth", "peer", "name", self.interface,
                 "netns", str(self._inside[name]))  # fmt: skip
        self._in("switch", "ip", "link", "set", port, "master", "br0", "up")
        self._in(name, "ip", "address", "add", f"{self.addresses[index]}/24", "dev", self.interface)
        self._in(name, "ip", "link", "set", self.interface, "up")
        # A token bucket cuts what is larger than it into frames, one by one, which takes a core at 500 Mbit/s; half a bucket passes whole.
        for place, device in ((name, self.interface), ("switch", port)):
            self._in(place, "ip", "link", "set", "dev", device, "gso_max_size", str(_BUCKET_BYTES // 2))

    def wait_for_ssh(self) -> None:
        """Every host answers the first one."""
        deadline = time.monotonic() + _START_LIMIT_S
        for name in self.names:
            while (tried := self.run(["ssh", "-o", "ConnectTimeout=5", name, "true"], timeout_s=20)).returncode:
                if time.monotonic() > deadline:
                    log = (self.directory / f"{name}.log").read_text()[-500:]
                    raise SetupError(f"host {name} does not answer by ssh: {tried.stdout.strip()} {log}; {_REMEDY}")
                time.sleep(0.1)

    def close(self) -> None:
        """End every process of every host; the kernel then takes the namespaces away."""
        for holder in self._holders:
            end(holder)
        for holder in self._holders:
            holder.wait()

    def _enter(self, place: str) -> list[str]:
        kinds = ["--net"] if place == "switch" else ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return [program("nsenter"), "-t", str(self._inside[place]), *kinds]

    def _in(self, place: str, tool: str, *arguments: str, check: bool = True) -> None:
        """Run a network command; only the network namespace is entered."""
        enter = [program("nsenter"), "-t", str(self._inside[place]), "--net", program(tool), *arguments]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=30, check=False)
        if check and done.returncode:
            raise SetupError(f"{tool} {' '.join(arguments)} failed on {place}: {done.stderr.strip()}; {_REMEDY}")


def end(holder: subprocess.Popen[bytes]) -> None:
    """Kill the first process of a host, and with it all of them, and its holder.

    The kernel ends the first process with the holder, but for one that has changed its user since.
    """
    for pid in _children(holder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    holder.kill()


def _children(holder: subprocess.Popen[bytes]) -> list[int]:
    """The first process of a host, while its holder, which ends with it, lives: the number is then its own."""
    if holder.poll() is not None:
        return []
    return [int(pid) for pid in Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()]


_REMEDY = "see that the kernel has network namespaces, veth, bridge and tbf, and that this container may use them"


def _remove_leftovers() -> None:
    """Directories of processes that were killed; their namespaces went with them."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def hosts(count: int, *, rate_mbit: float | None = None) -> Iterator[Hosts]:
    """Make ``count`` hosts on one switch, each link shaped to ``rate_mbit`` (1e6 bits a second) each way, and end them.

    Call it on the main thread: the kernel ties the hosts to the thread that made them.

    Raises:
        SetupError: not root, a program is missing, or the kernel refuses; the message says which.
    """
    if (reason := why_not()) is not None:
        raise SetupError(reason)
    if not 1 <= count <= 64:
        raise SetupError(f"{count} hosts cannot be made; use 1 to 64")
    _remove_leftovers()
    names = [f"hj{os.getpid()}n{number}" for number in range(count)]
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as directory:
        made = Hosts(names, Path(directory))
        try:
            write_files(made.directory, made.names, made.addresses)
            made.hold("switch", SWITCH)
            for index, name in enumerate(names):
                made.hold(name, HOLD)
                made.join(index)
            made.set_rate(rate_mbit)
            made.wait_for_ssh()
            yield made
        finally:
            made.close()
