"""``distill``: a student under a frozen teacher."""

from __future__ import annotations

from typing import Any

from horovod_jobs.bundle import read_config
from horovod_jobs.config import DistillStage
from horovod_jobs.distillation.cache import teacher_outputs
from horovod_jobs.distillation.objective import CachedTeacher, Distillation, Distiller, LiveTeacher, Teacher
from horovod_jobs.errors import ConfigError
from horovod_jobs.instantiate import instantiate
from horovod_jobs.predict import load_module
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.stages.evaluate import check_classes
from horovod_jobs.stages.train import artifact_name, build_model, check_outputs, fit_and_save
from horovod_jobs.training.precision import choose_device, place


def run(ctx: StageContext, cfg: DistillStage) -> StageResult:
    """Collective. Train ``cfg.model`` under ``needs.teacher``; the artifact is a ``model``."""
    source = ctx.inputs["teacher"]
    with ctx.world.agreed("distill.build"):
        called = f"teacher {artifact_name(source)}"
        check_classes(ctx.data, read_config(source), where=f"stages.{ctx.name}", model=called)
        device = choose_device(cfg.fit.device, local_rank=ctx.world.local_rank)
        teacher_model = load_module(source, allow_targets=ctx.allow_targets).to(device)
        student = build_model(ctx, cfg).to(device)
        distiller: Distiller = instantiate(cfg.distiller, allow=ctx.allow_targets, where=f"stages.{ctx.name}.distiller")
        given, wanted = check_outputs(ctx, teacher_model, called=called), check_outputs(ctx, student)
        if given != wanted:
            raise ConfigError(
                f"stages.{ctx.name}: {called} has outputs of shape {list(given)} and the student "
                f"{list(wanted)}; they must be the same classes, so train the teacher on this data set or choose another one"
            )
    details: dict[str, Any] = {"teacher": source.ref, "temperature": distiller.temperature}
    teacher: Teacher = LiveTeacher(teacher_model)
    if distiller.cache:
        outputs, ref, made = teacher_outputs(ctx, source, teacher_model, device=device)
        teacher = CachedTeacher(outputs)
        details["teacher_cache"] = {"artifact": ref, "made_here": made}
    objective = Distillation(student, teacher, distiller=distiller, task=ctx.task)
    place(objective, config=cfg.fit, world=ctx.world)
    return fit_and_save(ctx, cfg, objective, details=details)
