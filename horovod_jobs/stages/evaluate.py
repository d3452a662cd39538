"""``evaluate``: quality, latency, size and memory of any model artifact, by the same code for every format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from horovod_jobs.bundle import ModelConfig, read_config
from horovod_jobs.config import EvaluateStage
from horovod_jobs.errors import ConfigError
from horovod_jobs.evaluation import evaluate, refuse_non_finite_sums
from horovod_jobs.latency import measure
from horovod_jobs.predict import Predictor, load_config
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.storage import write_json

if TYPE_CHECKING:
    from horovod_jobs.data.base import DataModule, Split


def run(ctx: StageContext, cfg: EvaluateStage) -> StageResult:
    """Collective. Measure ``needs.model``; the artifact is an ``evaluation`` (evaluation.json).

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    artifact = ctx.inputs["model"]
    with ctx.world.agreed("evaluate.load"):
        if cfg.batch < 1:
            raise ConfigError(f"stages.{ctx.name}.batch={cfg.batch} is not a positive number; use at least 1")
        split = choose_split(ctx, cfg.split)
        config = read_config(artifact).in_format(cfg.format)
        predictor = load_config(config, allow_targets=ctx.allow_targets)
        check_classes(ctx.data, predictor, where=f"stages.{ctx.name}")
    sums = evaluate(predictor, split, ctx.task, world=ctx.world, batch=cfg.batch, name=f"{ctx.name}.{cfg.split}")
    refuse_non_finite_sums(
        sums,
        what=f"stages.{ctx.name}: what {artifact.ref} gives for the split {cfg.split}",
        remedy="look at the inputs of this split, or train the model anew with a lower optimizer.lr",
    )
    figures = ctx.task.summary(sums)

    def measured() -> dict[str, Any]:
        import torch

        first = split.fetch(torch.arange(min(len(split), max(cfg.latency_batches, default=1)))).inputs
        return measure(
            config.file,
            samples=first.numpy(),
            batches=cfg.latency_batches,
            runs=cfg.latency_runs,
            threads=cfg.latency_threads,
            allow_targets=ctx.allow_targets,
        )

    # The other ranks wait in a broadcast and sleep (a change of our Horovod build): the cores are rank 0's.
    latency = ctx.world.main(measured, name="evaluate.latency")
    metrics = {key: float(value) for key, value in figures.items() if isinstance(value, float)}
    metrics["peak_memory_bytes"] = float(latency["peak_memory_bytes"])
    details = {
        **{key: value for key, value in figures.items() if key not in metrics},
        "class_names": list(ctx.data.class_names),
        "split": cfg.split,
        "primary": ctx.task.primary,
        "model": artifact.ref,
        "format": predictor.format,
        "latency": latency,
    }
    result = StageResult(
        metrics=metrics,
        details=details,
        parameters=predictor.parameters,
        model_bytes=artifact.bytes if cfg.format is None else config.file.stat().st_size,
        latency_ms=latency["latency_ms"],
    )
    ctx.world.main(lambda: write_json(ctx.staging / "evaluation.json", vars_of(result)), name="evaluate.write")
    return result


def vars_of(result: StageResult) -> dict[str, Any]:
    """What evaluation.json holds."""
    return {
        "metrics": result.metrics,
        "details": result.details,
        "parameters": result.parameters,
        "model_bytes": result.model_bytes,
        "latency_ms": result.latency_ms,
    }


def choose_split(ctx: StageContext, name: str) -> Split:
    """The data set's split of that name.

    Raises:
        ConfigError: the data set has no such split.
    """
    splits = {"train": ctx.data.train, "validation": ctx.data.validation, "test": ctx.data.test}
    there = [key for key, split in splits.items() if split is not None]
    split = splits.get(name)
    if split is None:
        raise ConfigError(f"stages.{ctx.name}.split={name} is not in the data set; use one of {', '.join(there)}")
    return split


def check_classes(data: DataModule, given: Predictor | ModelConfig, *, where: str, model: str = "the model") -> None:
    """A model and a data set that belong together. ``where`` begins the message, ``model`` is what to call the model.

    Raises:
        ConfigError: other classes, or inputs of another shape or with other ids.
    """
    remedy = "choose the data set that it was trained on, or another one in its place"
    counts, wanted = (given.num_classes, tuple(given.input_shape)), (data.num_classes, tuple(data.input_shape))
    if counts != wanted:
        raise ConfigError(
            f"{where}: {model} has {counts[0]} classes and inputs {list(counts[1])}, the data set {wanted[0]} classes "
            f"and inputs {list(wanted[1])}; {remedy}"
        )
    ids, known = ({name: size for name, size, _ in fields} for fields in (given.fields, data.fields))
    if list(ids.items()) != list(known.items()):
        raise ConfigError(
            f"{where}: {model} was trained on the fields and numbers of ids {ids}, the data set has {known}; "
            "choose the data set, and its split, that it was trained on"
        )
    differ = [pair for pair in zip(given.class_names, data.class_names, strict=False) if pair[0] != pair[1]]
    if differ:
        raise ConfigError(
            f"{where}: {model} tells other classes apart ({differ[0][0]!r} where the data set has {differ[0][1]!r}); {remedy}"
        )
