"""The report stage: one HTML file and a model card about the run so far."""

from __future__ import annotations

from horovod_jobs.config import ReportStage
from horovod_jobs.report import collect, render_html, render_model_card
from horovod_jobs.stages.base import StageContext, StageResult
from horovod_jobs.storage import write_text

FILES = ("report.html", "model_card.md")


def run(ctx: StageContext, cfg: ReportStage) -> StageResult:
    """Collective. Rank 0 reads the run's manifest and artifacts, and writes the files into the artifact and the run.

    Raises:
        ArtifactError: the manifest cannot be read.
        StorageError: a file cannot be written.
    """
    details = ctx.world.main(lambda: _write(ctx), name="report.write")
    ctx.log.info("report: %s", ctx.run_dir / FILES[0])
    return StageResult(details=details)


def _write(ctx: StageContext) -> dict[str, int]:
    data = collect(ctx.run_dir, report_stage=ctx.name)
    texts = dict(zip(FILES, (render_html(data), render_model_card(data)), strict=True))
    for name, text in texts.items():
        write_text(ctx.staging / name, text)
        write_text(ctx.run_dir / name, text)
    return {
        "models": len(data.models),
        "stages": len(data.stages),
        **{f"{name}_bytes": len(t.encode()) for name, t in texts.items()},
    }
