"""``train``: a model on hard labels. Also what training stages share: building the parts, fitting, writing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from horovod_jobs.artifacts import Artifact
from horovod_jobs.config import TrainStage, effective_global_batch
from horovod_jobs.data.base import Batch, DataModule
from horovod_jobs.errors import ArtifactError, ConfigError
from horovod_jobs.instantiate import accepted, instantiate
from horovod_jobs.predict import load_module, save_model
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.storage import storage_errors
from horovod_jobs.training.batchnorm import synchronise
from horovod_jobs.training.fit import Fit
from horovod_jobs.training.objective import Supervised
from horovod_jobs.training.precision import place
from horovod_jobs.training.sparse import has_sparse_gradients, prepare_for_sparse_gradients
from horovod_jobs.training.state import seed_step


def run(ctx: StageContext, cfg: TrainStage) -> StageResult:
    """Collective. Train ``cfg.model``; the artifact is a ``model``."""
    with ctx.world.agreed("train.build"):
        model = build_model(ctx, cfg)
        loss = instantiate(cfg.loss, allow=ctx.allow_targets, where="loss") if cfg.loss is not None else None
        objective = Supervised(model, ctx.task, loss=loss)
        place(objective, config=cfg.fit, world=ctx.world)
        check_outputs(ctx, model, loss=objective)
    return fit_and_save(ctx, cfg, objective)


def build_model(ctx: StageContext, cfg: TrainStage) -> nn.Module:
    """The stage's model with seeded weights, or those of ``needs.init``."""
    seed_step(ctx.seed, -1, 0)  # The same weights on every rank.
    model = make_model(cfg.model, ctx.data, where=f"stages.{ctx.name}", allow=ctx.allow_targets)
    if "init" in ctx.inputs:
        start_from(model, ctx.inputs["init"], where=f"stages.{ctx.name}", allow=ctx.allow_targets)
    return model


def make_model(node: Mapping[str, Any], data: DataModule, *, where: str, allow: Sequence[str]) -> nn.Module:
    """The model that a node names, for this data set.

    Raises:
        ConfigError: it cannot be built, or is no torch module.
    """
    arguments = accepted(node, data.model_arguments, allow=allow)
    model = instantiate(node, allow=allow, where=f"{where}.model", **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where}.model: {node['_target_']} gives a {type(model).__name__}; name a torch.nn.Module")
    return model


def start_from(model: nn.Module, artifact: Artifact, *, where: str, allow: Sequence[str]) -> None:
    """Take the weights of an artifact.

    Raises:
        ArtifactError: they are another model's.
    """
    start = load_module(artifact, allow_targets=allow)
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise ArtifactError(
            f"{where}.needs.init={artifact.ref} holds weights of another model "
            f"({str(error).splitlines()[-1].strip()}); give an artifact of the same model"
        ) from error


def check_outputs(
    ctx: StageContext, model: nn.Module, *, loss: Callable[[Batch], Any] | None = None, called: str = "the model"
) -> tuple[int, ...]:
    """Shape of the model's outputs for one sample: see ``outputs_of``."""
    return outputs_of(model, ctx.data, where=f"stages.{ctx.name}", loss=loss, called=called)


def outputs_of(
    model: nn.Module,
    data: DataModule,
    *,
    where: str,
    loss: Callable[[Batch], Any] | None = None,
    called: str = "the model",
) -> tuple[int, ...]:
    """Shape of the model's outputs for one sample; a model or loss that does not fit the data is found before it trains.

    Raises:
        ConfigError: the model does not take the data's inputs or gives something other than [B, C].
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        batch = data.train.fetch(torch.zeros(1, dtype=torch.int64)).to(device)
        with torch.no_grad():
            outputs = model(batch.inputs)
            if loss is not None:
                loss(batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{where}: {called} does not fit inputs of shape {list(data.input_shape)} "
            f"({str(error).strip().splitlines()[0]}); choose another model or data set"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(outputs, torch.Tensor) or outputs.shape[0] != 1:
        raise ConfigError(
            f"{where}: {called} gives {type(outputs).__name__} for one sample; it must give a tensor [B, C]"
        )
    return tuple(outputs.shape[1:])


def fit_and_save(
    ctx: StageContext, cfg: TrainStage, objective: Any, *, details: dict[str, Any] | None = None
) -> StageResult:
    """Collective. Train an objective that is on its device, write its model into ``ctx.staging``."""
    world, allow = ctx.world, ctx.allow_targets
    if cfg.fit.sync_batchnorm:
        synchronise(objective, world=world, compiled=cfg.fit.compile)
    with world.agreed("train.parts"):
        trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = instantiate(cfg.optimizer, allow=allow, where=f"stages.{ctx.name}.optimizer", params=trainable)
        if has_sparse_gradients(objective):
            prepare_for_sparse_gradients(
                lambda params: instantiate(cfg.optimizer, allow=allow, where="optimizer", params=params),
                clip_norm=cfg.fit.clip_norm,
                where=f"stages.{ctx.name}",
            )
        schedule = instantiate(cfg.schedule, allow=allow, where=f"stages.{ctx.name}.schedule")
        strategy = instantiate(cfg.strategy, allow=allow, where=f"stages.{ctx.name}.strategy")
    fit = Fit(
        ctx,
        objective,
        config=cfg.fit,
        global_batch=effective_global_batch(cfg.fit, world_size=world.size),
        optimizer=optimizer,
        schedule=schedule,
        strategy=strategy,
        augment=cfg.augment,
        identity=ctx.fingerprint,
    )
    state = fit.run()
    parameters = sum(parameter.numel() for parameter in objective.model.parameters())
    node = dict(cfg.model)

    def write() -> int:
        with storage_errors("write the model to", ctx.staging):
            save_model(
                ctx.staging,
                objective.model.cpu(),
                model_node=node,
                num_classes=ctx.data.num_classes,
                input_shape=tuple(ctx.data.input_shape),
                class_names=tuple(ctx.data.class_names),
                input_dtype=ctx.data.input_dtype,
                fields=ctx.data.fields,
            )
        return sum(path.stat().st_size for path in ctx.staging.iterdir())

    model_bytes = world.main(write, name="train.write")
    last = state.history[-1] if state.history else {}
    metrics: dict[str, float] = {
        key: float(last[key])
        for key in ("train_loss", "validation_loss", f"validation_{ctx.task.primary}")
        if key in last
    }
    metrics.update(epochs=float(state.epoch), steps=float(state.step), **fit.whole.figures())
    return StageResult(
        metrics=metrics,
        details={
            "history": state.history,
            "exchange": fit.updater.describe(),
            "best_step": state.best_step,
            **(details or {}),
        },
        parameters=parameters,
        model_bytes=model_bytes,
        resumed_from_step=fit.resumed_from,
        spent_before=fit.spent_before,
    )


def artifact_name(artifact: Artifact) -> str:
    """How an input is called in messages."""
    return f"{artifact.ref} (stage {artifact.meta.get('stage', '?')})"
