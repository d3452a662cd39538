"""Static int8 against fp32 torch, bf16 torch and fp32 onnxruntime: latency of one trained model on real pictures.

Every round times each contender once, in the same order (A B C D A B C D ...), so that what else the machine does meets all of them
alike; figures are medians over rounds, ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import conclude, note, paired, parser, table
from horovod_jobs.bundle import read_config, resolve
from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.fashion_mnist import fashion_mnist
from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.export import export_onnx
from horovod_jobs.latency import child_environment
from horovod_jobs.predict import load_module
from horovod_jobs.quantization.base import Calibration
from horovod_jobs.quantization.calibration import calibration_batches, calibration_indices
from horovod_jobs.quantization.quantizer import StaticInt8
from horovod_jobs.runtimes.onnx import open_session

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


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {name: {"ms": own, "faster": paired(times[BASELINE], own)} for name, own in times.items()}


def models_table(result: dict[str, Any], batches: list[int]) -> str:
    head = ["", "accuracy"]
    for batch in batches:
        head += [f"batch {batch}, ms", f"{BASELINE} / this"]
    rows = []
    for name, share in result["accuracy"].items():
        row = [name, f"{100 * share:.2f} %"]
        for batch in batches:
            found = result["batches"][str(batch)][name]
            row += [f"{statistics.median(found['ms']):.3f}", str(found["faster"])]
        rows.append(row)
    sizes = ", ".join(f"{name} {size:,} bytes" for name, size in result["bytes"].items())
    return f"**{result['model']}**, {result['parameters']:,} parameters, {sizes}\n\n{table(head, rows)}"


def fitting(data: Any) -> list[str]:
    """The torch models of the newest run that were trained on these pictures.

    Raises:
        ConfigError: there are none.
    """
    for run in sorted(Path("runs").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        found = []
        for name in ("teacher", "student", "model"):
            with contextlib.suppress(JobError):
                config = read_config(f"{run.parent}:{name}")
                if config.input_shape == tuple(data.input_shape) and config.class_names == tuple(data.class_names):
                    found.append(f"{run.parent}:{name}")
        if found:
            return found
    raise ConfigError(
        "no run in runs/ has a model of Fashion-MNIST; run the main job first (make run), or name a model"
    )


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "")
    made.add_argument(
        "models", nargs="*", help="a torch model's artifact or RUN:STAGE; those of the newest fitting run without it"
    )
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--batches", default="1,64")
    args = made.parse_args()
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        # The allocator reads it when a process starts: without it page faults are timed.
        command = [sys.executable, "-m", "benchmarks.int8_latency", *sys.argv[1:]]
        os.execve(sys.executable, command, child_environment(os.environ, threads=args.threads))
    torch.set_num_threads(args.threads)
    batches, rounds = [int(batch) for batch in args.batches.split(",")], 3 if args.quick else 30
    data = fashion_mnist()
    results = []
    for path in args.models or fitting(data):
        note(path)
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            with torch.inference_mode(False):
                calls, result = contenders(path, data=data, directory=Path(directory), threads=args.threads)
            result["accuracy"] = {
                name: accuracy(call, data, half=name.startswith("bf16")) for name, call in calls.items()
            }
            result["batches"] = {
                str(batch): summarise(race(calls, data.test.fetch(torch.arange(batch)).inputs, rounds=rounds))
                for batch in batches
            }
        results.append(result)
    text = "\n\n".join(models_table(result, batches) for result in results) + (
        f"\n\nMedian of {rounds} rounds, {args.threads} thread(s). `{BASELINE} / this` is above 1 where a contender is faster than torch; "
        "what int8 itself brings is the difference from fp32 onnxruntime."
    )
    conclude("Latency of int8", text, figures={"models": results}, args=args)


if __name__ == "__main__":
    try:
        main()
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
