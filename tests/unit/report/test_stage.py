"""The report stage writes the same files into its artifact and into the run's directory."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.config import ReportStage
from horovod_jobs.stages.report import run


def test_report_stage(sample, tmp_path):
    run_dir = sample.write_sample(tmp_path, status="running")
    staging = tmp_path / "staging"
    staging.mkdir()
    context = SimpleNamespace(
        name="report", world=SingleWorld(), run_dir=run_dir, staging=staging, log=logging.getLogger("test_report_stage")
    )
    result = run(context, ReportStage(needs=sample.NEEDS["report"]))
    for name in ("report.html", "model_card.md"):
        assert (staging / name).read_bytes() == (run_dir / name).read_bytes()
        assert result.details[f"{name}_bytes"] == (staging / name).stat().st_size
    assert result.details["models"] == 4
    assert "finished on 2 ranks" in (staging / "report.html").read_text()
    json.dumps(result.details)
