"""What the commands cost before they do anything, in fresh processes; ``import torch`` is the yardstick."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import conclude, paired, parser, spread, table

_ENTRY = "import sys; from horovod_jobs.{module} import main; sys.exit(main())"  # what the installed command does
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import horovod_jobs": [sys.executable, "-c", "import horovod_jobs"],
    "horovod-runs ls": [sys.executable, "-c", _ENTRY.format(module="runs"), "ls"],
    "horovod-jobs --help": [sys.executable, "-c", _ENTRY.format(module="__main__"), "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def once(command: list[str], *, directory: str) -> float:
    """Seconds from the start of the process to its end.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    root = str(Path(__file__).resolve().parent.parent)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    start = time.perf_counter()
    subprocess.run(command, cwd=directory, env=environ, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = parser(__doc__ or "").parse_args()
    rounds = 2 if args.quick else 11
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="horovod-jobs-bench-") as directory:
        (Path(directory) / "runs").mkdir()
        for number in range(rounds + 1):
            for name, command in COMMANDS.items():
                taken = 1000 * once(command, directory=directory)
                if number:  # The first round reads the files into memory.
                    found[name].append(taken)
    ratios = {name: paired(times, found["import torch"]) for name, times in found.items()}
    rows = [[f"`{name}`", spread(times, digits=0), str(ratios[name])] for name, times in found.items()]
    text = (
        f"{table(['command', 'ms', '/ import torch'], rows)}\n\nMedian (smallest..largest) of {rounds} rounds of fresh processes, "
        "one after the other; files in memory."
    )
    conclude("Start-up time", text, figures={"ms": found, "to_import_torch": ratios}, args=args)


if __name__ == "__main__":
    main()
