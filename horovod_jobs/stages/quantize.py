"""``quantize``: turn a model into an integer one, load what was written, and hold it against the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horovod_jobs.bundle import CONFIG, read_config
from horovod_jobs.config import QuantizeStage
from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError, GateError
from horovod_jobs.evaluation import evaluate
from horovod_jobs.instantiate import instantiate
from horovod_jobs.predict import Predictor, load_module
from horovod_jobs.quantization.base import Calibration, Recipe
from horovod_jobs.quantization.calibration import calibration_batches, calibration_indices, indices_digest
from horovod_jobs.runtimes import FORMATS, Format
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.stages.evaluate import check_classes
from horovod_jobs.storage import write_json

if TYPE_CHECKING:
    from horovod_jobs.data.base import Split
    from horovod_jobs.tasks.base import Task

Predict = Callable[[Tensor], Tensor]
_CHECK_BATCHES = (1, 64)
_EVALUATION_BATCH = 250


def run(ctx: StageContext, cfg: QuantizeStage) -> StageResult:
    """Collective. Quantize ``needs.model``; the artifact is ``quantized`` (config.json and the file of the backend's format).

    Raises:
        ConfigError: calibration samples that are not there, or a model that cannot be quantized.
        GateError: the integer model is worse than ``max_drop`` allows, or gives other outputs when it is called again.
    """
    world, artifact = ctx.world, ctx.inputs["model"]
    with world.agreed("quantize.load"):
        recipe: Recipe = instantiate(cfg.quantizer, allow=ctx.allow_targets, where=f"stages.{ctx.name}.quantizer")
        form = format_of(recipe, stage=ctx.name)
        source = read_config(artifact)
        check_classes(ctx.data, source, where=f"stages.{ctx.name}")
        model = load_module(artifact, allow_targets=ctx.allow_targets)
        indices = calibration_indices(ctx.data.train, samples=cfg.calibration_samples, seed=ctx.seed)
        batches = calibration_batches(indices, batch=cfg.calibration_batch)
        split_name, split = gate_split(ctx, cfg)
    found = recipe.quantize(
        model,
        input_shape=source.input_shape,
        calibration=Calibration(ctx.data.train, batches),
        world=world,
        path=ctx.staging / form.file,
    )
    found |= {
        "calibration": {
            "samples": len(indices),
            "batch": cfg.calibration_batch,
            "indices_sha256": indices_digest(indices),
        },
        "gate": {"split": split_name, "samples": len(split), "max_drop_points": cfg.max_drop},
    }
    written = replace(source, format=form.name, directory=ctx.staging)
    config = {**written.to_json(), "quantization": found}  # What ``predict`` reads, and how it was made.
    world.main(lambda: write_json(ctx.staging / CONFIG, config), name="quantize.config")
    with world.agreed("quantize.reload"):
        quantized: Predictor = form.load(written, allow_targets=ctx.allow_targets)
        found["check"] = compare(model, quantized, split)
    metrics = hold_against(model, quantized, split, ctx)
    check_gate(metrics, primary=ctx.task.primary, max_drop=cfg.max_drop, stage=ctx.name, split=split_name)
    model_bytes = world.main(lambda: sum(path.stat().st_size for path in ctx.staging.iterdir()), name="quantize.bytes")
    return StageResult(metrics=metrics, details=found, parameters=source.parameters, model_bytes=model_bytes)


def format_of(recipe: Recipe, *, stage: str) -> Format:
    """What the recipe's backend writes.

    Raises:
        ConfigError: nothing here would load it.
    """
    form = getattr(recipe, "format", None)  # A recipe of the user's may have been written without.
    if form not in FORMATS:
        raise ConfigError(
            f"stages.{stage}.quantizer writes the format {form!r}, which nothing here loads; use a backend that writes "
            f"one of {', '.join(FORMATS)}"
        )
    return FORMATS[form]


def gate_split(ctx: StageContext, cfg: QuantizeStage) -> tuple[str, Split]:
    """The split that both models are held against: validation, or test where there is none.

    Raises:
        ConfigError: ``check_samples`` or ``max_drop`` cannot be used.
    """
    if cfg.max_drop is not None and cfg.max_drop < 0:
        raise ConfigError(
            f"stages.{ctx.name}.max_drop={cfg.max_drop} is negative; use percentage points from 0 on, or null"
        )
    name, split = ("test", ctx.data.test) if ctx.data.validation is None else ("validation", ctx.data.validation)
    if name == "test":
        ctx.log.warning("%s: the data set has no validation split, so the test split decides the gate", ctx.name)
    if cfg.check_samples is None:
        return name, split
    if not 1 <= cfg.check_samples <= len(split):
        raise ConfigError(
            f"stages.{ctx.name}.check_samples={cfg.check_samples} is not from 1 to {len(split)}, the size of the "
            f"{name} split; use a number in between, or null for all"
        )
    return name, _First(split, cfg.check_samples)


class _First:
    """The first ``count`` samples of a split."""

    def __init__(self, split: Split, count: int) -> None:
        self._split, self._count = split, count

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Tensor) -> Batch:
        return self._split.fetch(indices)


@torch.no_grad()
def compare(original: Predict, quantized: Predict, split: Split) -> list[dict[str, Any]]:
    """Hold two models against each other at two batch sizes, each batch called twice.

    Twice, because a graph that was changed in place under the compiler is right once only; the original too, because
    quantizing a copy must leave it as it was.

    Raises:
        GateError: a second call that differs from the first.
    """
    count = min(len(split), max(_CHECK_BATCHES))
    inputs = split.fetch(torch.arange(count)).inputs
    found = []
    for batch in _CHECK_BATCHES:
        outputs = {}
        for name, model in (("fp32", original), ("int8", quantized)):
            first, second = (torch.cat([model(part) for part in inputs.split(batch)]) for _ in range(2))
            if not torch.equal(first, second):
                largest = (first - second).abs().max().item()
                raise GateError(
                    f"the {name} model gives other outputs when it is called again with the same batch of {batch} "
                    f"(largest difference {largest:.3g}); it is not fit for use, so choose another recipe or backend"
                )
            outputs[name] = first
        found.append(
            {
                "batch": batch,
                "samples": count,
                "agreement": (outputs["fp32"].argmax(1) == outputs["int8"].argmax(1)).double().mean().item(),
                "max_logit_difference": (outputs["fp32"] - outputs["int8"]).abs().max().item(),
                "second_call_equal": True,
            }
        )
    return found


class _Pair:
    """The task's sums of two models at once, and how often they agree; outputs are ``[2, B, C]``."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        sums = {"agree": (outputs[0].argmax(1) == outputs[1].argmax(1)).sum().double()}
        for name, logits in zip(("fp32", "int8"), outputs, strict=True):
            sums |= {f"{name}.{key}": value for key, value in self._task.evaluation_sums(logits, batch).items()}
        return sums


def hold_against(original: Predict, quantized: Predict, split: Split, ctx: StageContext) -> dict[str, float]:
    """Collective. Both models' primary metric over the split, the drop in percentage points, and their agreement."""
    sums = evaluate(
        lambda inputs: torch.stack([original(inputs).float(), quantized(inputs)]),
        split,
        _Pair(ctx.task),
        world=ctx.world,
        batch=_EVALUATION_BATCH,
        name=f"{ctx.name}.quantized",
    )
    primary = ctx.task.primary
    metrics: dict[str, float] = {}
    for name in ("fp32", "int8"):
        own = {key.removeprefix(f"{name}."): value for key, value in sums.items() if key.startswith(f"{name}.")}
        metrics[f"{name}_{primary}"] = float(ctx.task.summary(own)[primary])  # type: ignore[arg-type]
    metrics["drop_points"] = 100 * (metrics[f"fp32_{primary}"] - metrics[f"int8_{primary}"])
    metrics["agreement"] = sums["agree"].item() / len(split)
    return metrics


def check_gate(metrics: dict[str, float], *, primary: str, max_drop: float | None, stage: str, split: str) -> None:
    """Refuse an integer model that has lost too much.

    Raises:
        GateError: with both figures, the drop, the limit and the remedy.
    """
    # 1e-9: one sample of a large split is not lost to the rounding of a difference.
    if max_drop is None or metrics["drop_points"] <= max_drop + 1e-9:
        return
    raise GateError(
        f"stages.{stage}: int8 {primary} {metrics[f'int8_{primary}']:.4f} on the {split} split is "
        f"{metrics['drop_points']:.2f} points below fp32's {metrics[f'fp32_{primary}']:.4f}, and "
        f"max_drop={max_drop:g}; "
        f"calibrate with more samples, use per_channel=true, or allow it by stages.{stage}.max_drop"
    )
