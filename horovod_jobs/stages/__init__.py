"""One module a stage kind: ``run(ctx, cfg) -> StageResult``, reached by every rank."""
