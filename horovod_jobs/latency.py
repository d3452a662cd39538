"""Latency and memory of one artifact, measured in a process of its own.

    python -m horovod_jobs.latency ARTIFACT --batches 1,64 --threads 1 [--json]

A fresh process, because thread pools and the allocator's state of the job that made the model would be measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_jobs.bundle import read_config
from horovod_jobs.errors import ConfigError, JobError

if TYPE_CHECKING:
    import numpy as np

    from horovod_jobs.predict import Predictor

_WARM_UP_RUNS = 10
_WARM_UP_S = 0.3
# Of a launcher: a process that inherits them would take itself for a rank.
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_", "HOROVOD_", "SLURM_")


def measure(
    path: str | Path,
    *,
    samples: np.ndarray[Any, Any],
    batches: Sequence[int],
    runs: int,
    threads: int,
    allow_targets: Sequence[str] = (),
) -> dict[str, Any]:
    """Start the measuring process and return what it found.

    ``samples`` ``[N, ...]`` are real inputs, repeated where a batch is larger. The result has ``latency_ms``
    ({batch: {p50, p95}}), ``peak_memory_bytes`` of that process, ``model_memory_bytes`` (its growth over the
    interpreter with the runtime imported) and how it was measured.

    Raises:
        ConfigError: a value that cannot be used.
        JobError: the process failed; the message has its last line.
    """
    _check(batches=batches, runs=runs, threads=threads)
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="horovod-jobs-latency-") as directory:
        file = Path(directory) / "samples.npy"
        np.save(file, samples[: max(batches)], allow_pickle=False)
        command = [sys.executable, "-m", "horovod_jobs.latency", str(path), "--json", "--samples", str(file)]
        command += [
            "--batches",
            ",".join(str(batch) for batch in batches),
            "--runs",
            str(runs),
            "--threads",
            str(threads),
        ]
        command += [item for target in allow_targets for item in ("--allow-target", target)]
        done = subprocess.run(
            command, env=child_environment(os.environ, threads=threads), capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise JobError(
            f"measuring the latency of {path} failed ({last.removeprefix('error: ')}); run "
            f"{' '.join(command[:5])} to see it"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def child_environment(environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """The environment of the measuring process: of no world, with an allocator that keeps its memory."""
    kept = {
        key: value
        for key, value in environment.items()
        if key.startswith("HOROVOD_JOBS_") or not key.startswith(_LAUNCHER_PREFIXES)
    }
    kept.update(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        # Otherwise large batches are given back to the system after every run, and page faults are timed (2-4 times as
        # long).
        MALLOC_MMAP_MAX_="0",
        MALLOC_TRIM_THRESHOLD_="-1",
        # The same modules as here, wherever the job found them.
        PYTHONPATH=os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    )
    return kept


def time_calls(call: Callable[[], Any], *, runs: int) -> dict[str, float]:
    """Median and 95th percentile of one call in ms, after a warm-up."""
    import numpy as np

    end = time.perf_counter() + _WARM_UP_S
    warmed = 0
    while warmed < _WARM_UP_RUNS or time.perf_counter() < end:
        call()
        warmed += 1
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return {"p50": float(p50), "p95": float(p95)}


def cpu_name() -> str:
    """The CPU's name: what a latency depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(
                (line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), "unknown CPU"
            )
    except OSError:
        return "unknown CPU"


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far.

    Not ``ru_maxrss`` where Linux says better: that one starts at the size of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure_here(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    batches = [int(batch) for batch in arguments.batches.split(",")]
    _check(batches=batches, runs=arguments.runs, threads=arguments.threads)
    config = read_config(arguments.artifact)
    form = config.kept_as
    form.import_runtime()
    idle_bytes = peak_memory_bytes()
    predictor: Predictor = form.load(config, threads=arguments.threads, allow_targets=arguments.allow_target)
    shape = (max(batches), *config.input_shape)
    if arguments.samples:
        samples = np.load(arguments.samples, allow_pickle=False).astype(config.input_dtype)
        samples = np.resize(samples, shape)  # Repeats them where there are too few.
    elif config.input_dtype != "float32":
        samples = np.zeros(shape, config.input_dtype)  # An id or token that every model has.
    else:
        samples = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    latency = {}
    for batch in batches:
        inputs = np.ascontiguousarray(samples[:batch])
        latency[str(batch)] = time_calls(predictor.caller(inputs), runs=arguments.runs)
    peak = peak_memory_bytes()
    return {
        "latency_ms": latency,
        "peak_memory_bytes": peak,
        "model_memory_bytes": max(0, peak - idle_bytes),
        "format": config.format,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "runs": arguments.runs,
        "inputs": "samples" if arguments.samples else "random normal" if samples.dtype == np.float32 else "zeros",
    }


def _check(*, batches: Sequence[int], runs: int, threads: int) -> None:
    if not batches or min(batches) < 1:
        raise ConfigError(f"latency_batches={list(batches)} must be whole numbers from 1 on; use [1, 64]")
    if runs < 1 or threads < 1:
        raise ConfigError(f"latency_runs={runs} and latency_threads={threads} must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_jobs.latency", description="Latency and memory of a model."
    )
    parser.add_argument("artifact", help="an artifact's or bundle's directory, a model.onnx in one, or RUN:STAGE")
    parser.add_argument("--batches", default="1,64", help="batch sizes, separated by commas (1,64)")
    parser.add_argument("--runs", type=int, default=50, help="timed calls for each batch size (50)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--samples",
        help="a .npy file of inputs [N, ...]; without it they are random, or zero where the model takes whole numbers",
    )
    parser.add_argument(
        "--allow-target", action="append", default=[], help="a module of yours that the model's _target_ names"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    arguments = parser.parse_args(argv)
    try:
        result = _measure_here(arguments)
    except JobError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except ValueError as error:
        sys.stderr.write(f"error: --batches={arguments.batches} or the samples cannot be read ({error})\n")
        return ConfigError.exit_code
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))
    return 0


def _text(result: Mapping[str, Any]) -> str:
    lines = [
        f"batch {batch:>5}: {figures['p50']:.3f} ms (95 %: {figures['p95']:.3f} ms)"
        for batch, figures in result["latency_ms"].items()
    ]
    peak, model = result["peak_memory_bytes"] / 2**20, result["model_memory_bytes"] / 2**20
    lines.append(f"peak memory {peak:.1f} MiB, model {model:.1f} MiB")
    lines.append(
        f"{result['format']}, {result['threads']} thread(s), {result['runs']} runs, inputs: {result['inputs']}"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
