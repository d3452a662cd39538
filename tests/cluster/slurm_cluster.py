"""A Slurm of this machine alone: munged, slurmctld and slurmd with private files, sockets and ports, ended with the body."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_START_LIMIT_S = 40.0
_CONTROLLER = ("slurmctld", "-D", "-i")

# cons_tres counts processors, so that two ranks are two of them; a partition of higher tier preempts by requeueing.
_CONFIG = """
ClusterName=horovodjobs
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SrunPortRange=0
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
TmpFS={directory}/tmp
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=300
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


def why_not() -> str | None:
    """Why a Slurm cannot be started here, in a sentence; None where it can."""
    if os.geteuid() != 0:
        return "a private Slurm is started as root"
    missing = [name for name in _NEEDED if shutil.which(name, path=_SEARCH) is None]
    if missing:
        return f"{', '.join(missing)} is not installed; on Debian: apt-get install slurm-wlm munge"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running Slurm of one node: its files, and its daemons by name."""

    directory: Path
    daemons: dict[str, subprocess.Popen[bytes]]

    def environment(self) -> dict[str, str]:
        """This process's environment, with the private configuration."""
        return {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def run(self, *argv: str, check: bool = True) -> str:
        """A command of Slurm; its output."""
        done = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Without the controller while the body runs; jobs go on, and it knows them when it is back."""
        _end(self.daemons.pop("slurmctld"))
        yield
        self.daemons["slurmctld"] = _daemon(self, _CONTROLLER, "slurmctld-out")
        _until(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).strip() != "", self, "an answer of slurmctld")

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test's message."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


def _program(name: str) -> str:
    return shutil.which(name, path=_SEARCH) or name


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the three daemons, wait until the node is idle, and end them with every job."""
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-slurm-") as text:
        made = Cluster(Path(text), {})
        os.chmod(text, 0o755)  # munge refuses a socket below a directory that others may not enter.
        ctld_port, slurmd_port = _free_ports(2)
        (made.directory / "state").mkdir()
        (made.directory / "spool").mkdir()
        (made.directory / "tmp").mkdir(mode=0o777)
        (made.directory / "slurm.conf").write_text(
            _CONFIG.format(
                host=socket.gethostname().split(".")[0], directory=text, ctld_port=ctld_port, slurmd_port=slurmd_port
            )
        )
        key = made.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            munge = ["munged", "--foreground", f"--socket={text}/munge.socket", f"--key-file={key}"]
            munge += [f"--pid-file={text}/munge.pid", f"--seed-file={text}/munge.seed", f"--log-file={text}/munge.log"]
            made.daemons["munged"] = _daemon(made, munge, "munged")
            _until(lambda: (made.directory / "munge.socket").exists(), made, "munged's socket")
            made.daemons["slurmctld"] = _daemon(made, _CONTROLLER, "slurmctld-out")
            made.daemons["slurmd"] = _daemon(made, ("slurmd", "-D"), "slurmd-out")
            _until(lambda: "idle" in made.run("sinfo", "-h", "-o", "%T", check=False), made, "an idle node")
            yield made
            _end_jobs(made)
        finally:
            for name in ("slurmd", "slurmctld", "munged"):
                if name in made.daemons:
                    _end(made.daemons[name])


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _daemon(made: Cluster, argv: Sequence[str], log: str) -> subprocess.Popen[bytes]:
    with (made.directory / f"{log}.log").open("ab") as output:
        return subprocess.Popen(
            [_program(argv[0]), *argv[1:]],
            env=made.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _until(look: Callable[[], bool], made: Cluster, what: str) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not look():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in made.daemons.values()):
            raise RuntimeError(f"no {what} within {_START_LIMIT_S:g} s\n{made.logs()}")
        time.sleep(0.1)


def _end_jobs(made: Cluster) -> None:
    made.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
    made.run("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 60
    while made.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
        time.sleep(0.2)
