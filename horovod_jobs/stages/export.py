"""``export``: a bundle that other programs load, checked against the model it was made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from horovod_jobs.bundle import CONFIG, ONNX_FILE, WEIGHTS, ModelConfig, read_config
from horovod_jobs.config import ExportStage
from horovod_jobs.errors import ConfigError, GateError
from horovod_jobs.export import export_onnx
from horovod_jobs.predict import load_module, open_session
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.stages.evaluate import check_classes
from horovod_jobs.storage import storage_errors, write_text

_CHECK_BATCHES = (1, 64)


def run(ctx: StageContext, cfg: ExportStage) -> StageResult:
    """Collective. Bundle ``needs.model``; the artifact is an ``export``.

    Raises:
        ConfigError: the model cannot be written as ONNX.
        GateError: the ONNX file's outputs differ from torch's by more than ``tolerance``.
    """
    artifact = ctx.inputs["model"]
    with ctx.world.agreed("export.read"):
        if not cfg.tolerance > 0:
            raise ConfigError(
                f"stages.{ctx.name}.tolerance={cfg.tolerance} is not positive; use a small number such as 1e-4"
            )
        source = read_config(artifact)
        check_classes(ctx.data, source, where=f"stages.{ctx.name}")
    found: dict[str, Any] = ctx.world.main(lambda: _write(ctx, cfg, source), name="export.write")
    return StageResult(
        metrics=found.pop("metrics"),
        details=found,
        parameters=source.parameters,
        model_bytes=found["files"][found["runs"]],
    )


def _write(ctx: StageContext, cfg: ExportStage, source: ModelConfig) -> dict[str, Any]:
    """Rank 0: fill the staging directory."""
    staging = ctx.staging
    names = [CONFIG, source.file.name]
    with storage_errors("write the bundle to", staging):
        for name in names:
            shutil.copyfile(source.directory / name, staging / name)
    metrics: dict[str, float] = {}
    if source.format == "torch" and cfg.onnx:
        module = load_module(ctx.inputs["model"], allow_targets=ctx.allow_targets)
        export_onnx(module, staging / ONNX_FILE, input_shape=source.input_shape, input_dtype=source.input_dtype)
        names.append(ONNX_FILE)
        samples = ctx.data.test.fetch(torch.arange(min(len(ctx.data.test), max(_CHECK_BATCHES)))).inputs
        difference = onnx_difference(module, staging / ONNX_FILE, samples)
        check_tolerance(difference, tolerance=cfg.tolerance, stage=ctx.name)
        metrics["onnx_max_difference"] = difference
    write_text(staging / "README.md", readme(source, names))
    files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    return {
        "metrics": metrics,
        "source": ctx.inputs["model"].ref,
        "files": files,
        "runs": source.file.name,
        "checked_batches": list(_CHECK_BATCHES) if metrics else [],
    }


@torch.no_grad()
def onnx_difference(module: torch.nn.Module, path: Path, samples: torch.Tensor) -> float:
    """The largest absolute difference of an ONNX file's outputs from the module's: two batch sizes, two calls each."""
    session = open_session(path, threads=1)
    largest = 0.0
    for batch in _CHECK_BATCHES:
        for part in samples.split(batch):
            expected = module(part)
            for _ in range(2):
                found = torch.from_numpy(session.run(["logits"], {"inputs": part.numpy()})[0])
                difference = (found - expected).abs().max().item()
                # A comparison with NaN is false: it must not pass for equality.
                largest = max(largest, difference) if difference == difference else float("inf")
    return largest


def check_tolerance(difference: float, *, tolerance: float, stage: str) -> None:
    """Refuse an ONNX file that is another model.

    Raises:
        GateError: with the difference and the limit.
    """
    if difference > tolerance:
        raise GateError(
            f"stages.{stage}: the ONNX outputs differ from torch's by up to {difference:.3g}, and "
            f"tolerance={tolerance:g}; "
            f"allow it by stages.{stage}.tolerance if logits of that size make it harmless, or set "
            f"stages.{stage}.onnx=false"
        )


def _inputs(config: ModelConfig) -> str:
    """What a caller must put in."""
    if not config.fields:
        return "Inputs must be prepared (normalised, say) as they were in training."
    columns = ", ".join(
        f"{name} (0 to {size - 1}{f', {many} columns' if many > 1 else ''})" for name, size, many in config.fields
    )
    return f"The columns are ids, as the data set gave them in training, 0 for none: {columns}."


def readme(config: ModelConfig, names: list[str]) -> str:
    """The bundle's README.md: what it holds and how to use it with and without this package."""
    shape = ", ".join(str(size) for size in config.input_shape)
    dtype = "" if config.input_dtype == "float32" else f", dtype=torch.{config.input_dtype}"
    target = config.model.get("_target_", "unknown")
    described = {
        CONFIG: "the model's class and arguments, input shape and class names",
        WEIGHTS: "the weights, in safetensors format",
        ONNX_FILE: "the model for ONNX runtimes: input `inputs`, output `logits`, a batch of any size",
    }
    parts = [
        "# Exported model",
        f"`{target}` with {config.parameters:,} parameters: {config.input_dtype} inputs `[B, {shape}]`, logits `[B, "
        f"{config.num_classes}]` "
        f"for the classes {', '.join(config.class_names)}. {_inputs(config)}",
        "\n".join(f"- `{name}`: {described[name]}" for name in names),
        "## With horovod_jobs",
        f"""```python
import horovod_jobs
import torch

model = horovod_jobs.load("path/to/this/directory")
logits = model(torch.zeros(1, {shape}{dtype}))
print(model.class_names[int(logits.argmax(1))])
```""",
    ]
    if ONNX_FILE in names:
        parts += [
            "## With onnxruntime alone",
            f"""```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {{"inputs": np.zeros((1, {shape}), np.{config.input_dtype})}})[0]
```""",
        ]
    return "\n\n".join(parts) + "\n"
