"""What every launcher works with: this host, the job's command, a plan, and the part of the environment that may travel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import ConfigError

# What a rank needs of the environment. Anything else, a password in a variable say, stays behind; launch.env adds names.
_NAMES = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "TERM", "COLUMNS", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
          "LD_PRELOAD", "HOSTNAME", "XDG_CACHE_HOME", "NO_COLOR", "HYDRA_FULL_ERROR")  # fmt: skip
_PREFIXES = ("LC_", "PYTHON", "HOROVOD_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "OMPI_", "PMIX_MCA_", "PRTE_MCA_", "UCX_",
             "NCCL_", "CUDA_", "NVIDIA_", "TORCH_", "TORCHINDUCTOR_", "MALLOC_")  # fmt: skip
# Marks of a world that this process itself may have been started in; a new world must not inherit them.
_MARKS = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_", "HOROVOD_GLOO_", "HOROVOD_CONTROLLER", "OMPI_COMM_",
          "OMPI_UNIVERSE_", "HOROVOD_CPU_OPERATIONS")  # fmt: skip


def trains_with(config: Mapping[str, Any], target: str) -> bool:
    """Whether a stage of a resolved config has a strategy of this ``_target_``."""
    stages = [stage for stage in (config.get("stages") or {}).values() if stage.get("enabled", True)]
    strategies = [stage.get("strategy") for stage in stages]
    return any(isinstance(node, Mapping) and node.get("_target_") == target for node in strategies)


@dataclass(frozen=True)
class JobCommand:
    """The job that is to be started, as its ranks will be told."""

    name: str
    arguments: tuple[str, ...]  # of horovod-jobs in every rank: what the person typed, without the launcher
    typed: tuple[str, ...]  # what the person typed, to reproduce the run
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved
    of_sweep: bool = False  # one of the jobs of a multirun
    outlives_ranks: bool = False  # its strategy goes on without ranks that die, where the launcher lets it

    def argv(self, python: str) -> list[str]:
        """The command of a rank under a Python."""
        return [python, "-m", "horovod_jobs", *self.arguments]

    @property
    def has_servers(self) -> bool:
        """Whether a stage trains with a parameter server."""
        return trains_with(self.config, "horovod_jobs.strategy.parameter_server.ParameterServer")


@dataclass(frozen=True)
class Host:
    """What the launcher must know of this host."""

    python: str
    mpirun: str | None
    has_mpi4py: bool
    has_horovod: bool
    cores: int
    is_root: bool
    has_ulfm: bool = False  # its mpirun can leave ranks running when one dies


@dataclass(frozen=True)
class LaunchPlan:
    """A command and its whole environment, and the files it reads."""

    argv: list[str]
    env: dict[str, str]
    controller: str
    files: dict[str, str] = field(default_factory=dict)  # name -> text: a batch script, a manifest


def meant(words: Sequence[str]) -> tuple[str, ...]:
    """What was typed, without the wish to see it first: a job that is shown is the job that would run."""
    return tuple(word for word in words if word.lstrip("+~").partition("=")[0] != "launch.dry_run")


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
        has_mpi4py=find_spec("mpi4py") is not None,
        has_horovod=find_spec("horovod") is not None,
        cores=usable_cores(),
        is_root=os.geteuid() == 0,
        has_ulfm=_has_ulfm(shutil.which("mpirun", path=search)),
    )


def _has_ulfm(mpirun: str | None) -> bool:
    """Open MPI has it from version 5 on; an older one, and others, would refuse the option."""
    if mpirun is None:
        return False
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    found = re.search(r"Open MPI\)\s+(\d+)\.", done.stdout)
    return found is not None and int(found[1]) >= 5


def environment(launch: LaunchConfig, *, host: Host, environ: Mapping[str, str]) -> dict[str, str]:
    """Of this process's variables those that the ranks get, and those that every rank needs.

    Raises:
        ConfigError: a variable named in ``launch.env`` is not set.
    """
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
