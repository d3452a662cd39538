"""Start a world of ranks for a job: what to run is decided by pure functions, ``start`` runs it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from horovod_jobs.comm.connect import rank_hint
from horovod_jobs.config import LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.errors import ConfigError, SetupError

_DIR = "HOROVOD_JOBS_LAUNCH_DIR"
_COMMAND = "HOROVOD_JOBS_COMMAND"

# What a rank needs of the environment. Anything else, a password in a variable say, stays behind; launch.env adds names.
_NAMES = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "TERM", "COLUMNS", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
          "LD_PRELOAD", "HOSTNAME", "XDG_CACHE_HOME", "NO_COLOR", "HYDRA_FULL_ERROR")  # fmt: skip
_PREFIXES = ("LC_", "PYTHON", "HOROVOD_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "OMPI_", "PMIX_MCA_", "PRTE_MCA_", "UCX_",
             "NCCL_", "CUDA_", "NVIDIA_", "TORCH_", "TORCHINDUCTOR_", "MALLOC_")  # fmt: skip
# Marks of a world that this process itself may have been started in; a new world must not inherit them.
_MARKS = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_", "HOROVOD_GLOO_", "HOROVOD_CONTROLLER", "OMPI_COMM_",
          "OMPI_UNIVERSE_", "HOROVOD_CPU_OPERATIONS")  # fmt: skip

# Measured (docs/training.md): a step of a small transformer takes 1.8x as long where idle ranks do not yield their core.
_TUNED_MPI = ("--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "self,sm", "--mca", "pml", "ob1",
              "--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "4")  # fmt: skip


@dataclass(frozen=True)
class Host:
    """What the launcher must know of this host."""

    python: str
    mpirun: str | None
    horovodrun: str | None
    has_mpi4py: bool
    has_horovod: bool
    cores: int
    is_root: bool


@dataclass(frozen=True)
class LaunchPlan:
    """A command and its whole environment."""

    argv: list[str]
    env: dict[str, str]
    controller: str


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def this_host() -> Host:
    """Look at this host, the environment of this Python first."""
    beside = str(Path(sys.executable).parent)
    search = beside + os.pathsep + os.environ.get("PATH", os.defpath)
    return Host(
        python=sys.executable,
        mpirun=shutil.which("mpirun", path=search),
        horovodrun=shutil.which("horovodrun", path=search),
        has_mpi4py=find_spec("mpi4py") is not None,
        has_horovod=find_spec("horovod") is not None,
        cores=usable_cores(),
        is_root=os.geteuid() == 0,
    )


def plan(launch: LaunchConfig, *, host: Host, environ: Mapping[str, str], command: Sequence[str]) -> LaunchPlan:
    """The command that starts ``launch.np`` ranks of ``command`` on this host. Pure.

    Raises:
        SetupError: Horovod, MPI or mpi4py is not there (the message says how to get it).
        ConfigError: a variable named in ``launch.env`` is not set.
    """
    if not host.has_horovod:
        raise SetupError(
            f"launch.np={launch.np} asks for a world of ranks and Horovod is not installed; build it with launch/build_horovod.sh "
            "(launch/install.sh does this), or use launch=none for one process"
        )
    mpi_ready = host.mpirun is not None and host.has_mpi4py
    controller = launch.controller if launch.controller != "auto" else ("mpi" if mpi_ready else "gloo")
    if controller == "mpi" and not mpi_ready:
        missing = "mpirun" if host.mpirun is None else "mpi4py"
        raise SetupError(
            f"launch.controller=mpi needs {missing}, which is not installed; run launch/install.sh, or use gloo"
        )
    env = _environment(launch, host=host, environ=environ)
    if controller == "mpi":
        return LaunchPlan([str(host.mpirun), "-np", str(launch.np), "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE",
                           *_TUNED_MPI, *command], env, controller)  # fmt: skip
    if host.horovodrun is None:
        raise SetupError("launch.controller=gloo needs horovodrun, which is not installed; run launch/install.sh")
    env.pop(TERMINAL_VARIABLE, None)  # horovodrun writes the rank before each line, which would tear bars apart.
    return LaunchPlan([host.horovodrun, "--gloo", "-np", str(launch.np), *command], env, controller)


def _environment(launch: LaunchConfig, *, host: Host, environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in launch.env if name not in environ]
    if missing:
        raise ConfigError(
            f"launch.env names {', '.join(missing)}, which is not set here; export it or take it off the list"
        )
    env = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name in launch.env or name.startswith(_PREFIXES)) and not name.startswith(_MARKS)
    }
    threads = launch.threads or max(1, host.cores // launch.np)
    env.setdefault("OMP_NUM_THREADS", str(threads))
    if launch.threads:
        env["OMP_NUM_THREADS"] = str(threads)
    env["PATH"] = str(Path(host.python).parent) + os.pathsep + env.get("PATH", os.defpath)
    if host.is_root:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return env


def start(launch: LaunchConfig, *, overrides: Sequence[str], config: Sequence[str]) -> int:
    """Run the job's command in a world of its own and wait for it. Gives the job's exit code.

    Ctrl-C and SIGTERM are passed to every rank, which agree, write a checkpoint and end; after ``launch.grace_s`` they are killed.
    """
    command = [sys.executable, "-m", "horovod_jobs", *config, *overrides, "launch=none"]
    environ = dict(os.environ)
    environ[_COMMAND] = json.dumps(["horovod-jobs", *sys.argv[1:]])
    if sys.stderr.isatty():
        environ[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
    planned = plan(launch, host=this_host(), environ=environ, command=command)
    if launch.dry_run:
        print(shlex.join(planned.argv))
        return 0
    return run_world(planned, grace_s=launch.grace_s)


def run_world(planned: LaunchPlan, *, grace_s: float) -> int:
    """Start the launcher in a session of its own, pass signals to its ranks, and give the job's exit code."""
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-") as directory:
        process = subprocess.Popen(
            planned.argv, env={**planned.env, _DIR: directory}, start_new_session=True, preexec_fn=_die_with_parent
        )
        stopper = _Stopper(process, Path(directory), grace_s=grace_s)
        before = {number: signal.signal(number, stopper) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = stopper.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _kill_group(process)
        recorded = [int(path.read_text()) for path in sorted(Path(directory).glob("exit-*"))]
    failed = [value for value in recorded if value]
    if not failed and code and stopper.asked:
        return 128 + stopper.asked  # Ended by force before a rank could tell its code.
    return failed[0] if failed else (128 - code if code < 0 else code)


def _die_with_parent() -> None:
    # A killed parent must not leave ranks behind: the kernel then ends mpirun, and mpirun its ranks. Linux only.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


class _Stopper:
    """A signal handler that asks the ranks to stop, then insists."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, *, grace_s: float) -> None:
        self._process, self._directory, self._grace_s = process, directory, grace_s
        self._deadline: float | None = None
        self.asked = 0  # the first signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first = self._deadline is None
        self.asked = self.asked or int(number)
        self._deadline = time.monotonic() + (self._grace_s if first else 0.0)
        for path in self._directory.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.name.split("-")[1]), number)
        if first and not any(self._directory.glob("pid-*")):
            self._deadline = time.monotonic()  # No rank listens yet.

    def wait(self) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=0.2)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=10)
                _kill_group(self._process)
                return self._process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# --- what a rank tells the parent that started it ----------------------------------------------------------------------


def register_rank() -> None:
    """Let the parent know whom to pass signals to."""
    if directory := os.environ.get(_DIR):
        with contextlib.suppress(OSError):
            (Path(directory) / f"pid-{os.getpid()}").touch()


def record_exit(code: int) -> bool:
    """Tell the parent this rank's exit code, where one started it: launchers do not pass it on faithfully."""
    directory = os.environ.get(_DIR)
    if directory is None:
        return False
    with contextlib.suppress(OSError):
        (Path(directory) / f"exit-{rank_hint():06d}").write_text(str(code))
        return True
    return False


def original_command() -> list[str] | None:
    """What the person typed, where a parent started this rank."""
    text = os.environ.get(_COMMAND)
    return list(json.loads(text)) if text else None


def set_threads(local_size: int) -> None:
    """Share the cores between the ranks of this host, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, usable_cores() // local_size))
