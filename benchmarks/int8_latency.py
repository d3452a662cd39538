"""Static int8 against fp32 torch, bf16 torch and fp32 onnxruntime: latency of one trained model on real pictures.

    python benchmarks/int8_latency.py [MODEL ...] [--threads 1] [--batches 1,64] [--rounds 30] [--json FILE]

MODEL is a torch model artifact or RUN:STAGE (default: teacher and student of runs/latest). Every round times each
contender once, in the same order (A B C D A B C D ...), so what else the machine does meets all of them alike; figures
are medians over rounds, ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from horovod_jobs.bundle import read_config, resolve
from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.fashion_mnist import fashion_mnist
from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.export import export_onnx
from horovod_jobs.latency import child_environment
from horovod_jobs.predict import load_module, open_session
from horovod_jobs.quantization.base import Calibration
from horovod_jobs.quantization.calibration import calibration_batches, calibration_indices
from horovod_jobs.quantization.quantizer import StaticInt8
from horovod_jobs.versions import versions

OURS, BASELINE = "static int8 (ours)", "fp32 torch"
ROUND_S = 0.05  # Calls a contender makes in one round last about so long.
Call = Callable[[torch.Tensor], Any]


def contenders(path: str, *, data: Any, directory: Path, threads: int) -> tuple[dict[str, Call], dict[str, Any]]:
    config = read_config(path)
    if tuple(config.input_shape) != tuple(data.input_shape):
        raise ConfigError(f"{path} takes inputs {list(config.input_shape)}; give a model trained on Fashion-MNIST")
    module = load_module(resolve(path))
    half = load_module(resolve(path)).to(torch.bfloat16)
    export_onnx(module, directory / "fp32.onnx", input_shape=config.input_shape)
    indices = calibration_indices(data.train, samples=1024, seed=0)
    calibration = Calibration(data.train, calibration_batches(indices, batch=64))
    details = StaticInt8().quantize(
        module,
        input_shape=config.input_shape,
        calibration=calibration,
        world=SingleWorld(),
        path=directory / "int8.onnx",
    )
    fp32 = open_session(directory / "fp32.onnx", threads=threads)
    int8 = open_session(directory / "int8.onnx", threads=threads)
    calls: dict[str, Call] = {
        BASELINE: module,
        # Inputs are converted outside, as a model that is bf16 throughout would get them.
        "bf16 torch": lambda inputs: half(inputs),
        "fp32 onnxruntime": lambda inputs: fp32.run(["logits"], {"inputs": inputs.numpy()})[0],
        OURS: lambda inputs: int8.run(["logits"], {"inputs": inputs.numpy()})[0],
    }
    told = {"model": path, "parameters": config.parameters, "kernels": details["kernels"]}
    return calls, told | {"bytes": {name: (directory / name).stat().st_size for name in ("fp32.onnx", "int8.onnx")}}


def accuracy(call: Call, data: Any, *, half: bool) -> float:
    right = 0
    for indices in torch.arange(len(data.test)).split(250):
        batch = data.test.fetch(indices)
        logits = call(batch.inputs.bfloat16() if half else batch.inputs)
        right += int((torch.as_tensor(logits).argmax(1) == batch.targets).sum())
    return right / len(data.test)


def race(calls: dict[str, Call], inputs: torch.Tensor, *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call, one figure a round for each contender."""
    given = {name: inputs.bfloat16() if name.startswith("bf16") else inputs for name in calls}
    repeats = {}
    for name, call in calls.items():
        for _ in range(5):
            call(given[name])
        start = time.perf_counter()
        call(given[name])
        repeats[name] = max(1, round(ROUND_S / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call(given[name])
            times[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "ms": statistics.median(own),
            "speed_up": statistics.median(base / mine for base, mine in zip(times[BASELINE], own, strict=True)),
        }
        for name, own in times.items()
    }


def table(result: dict[str, Any], batches: list[int]) -> str:
    head = ["", "accuracy", *(f"batch {batch}: ms (times {BASELINE})" for batch in batches)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, share in result["accuracy"].items():
        cells = [result["batches"][str(batch)][name] for batch in batches]
        shown = [f"{cell['ms']:.3f} ({cell['speed_up']:.2f})" for cell in cells]
        lines.append("| " + " | ".join([name, f"{share:.2%}", *shown]) + " |")
    sizes = ", ".join(f"{name} {size:,} bytes" for name, size in result["bytes"].items())
    return f"**{result['model']}**, {result['parameters']:,} parameters, {sizes}\n\n" + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["runs/latest:teacher", "runs/latest:student"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        # The allocator reads it when a process starts: without it page faults are timed.
        environment = child_environment(os.environ, threads=arguments.threads)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    data = fashion_mnist()
    results = []
    for path in arguments.models:
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            with torch.inference_mode(False):
                calls, result = contenders(path, data=data, directory=Path(directory), threads=arguments.threads)
            result["accuracy"] = {
                name: accuracy(call, data, half=name.startswith("bf16")) for name, call in calls.items()
            }
            result["batches"] = {
                str(batch): summarise(race(calls, data.test.fetch(torch.arange(batch)).inputs, rounds=arguments.rounds))
                for batch in batches
            }
        results.append(result)
        print(table(result, batches), end="\n\n", flush=True)
    figures = {"threads": arguments.threads, "rounds": arguments.rounds, "versions": versions(), "models": results}
    print(json.dumps(figures))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
