"""A job whose second rank takes twice as long for a sample: its share falls, the report shows it, and a killed job keeps it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from horovod_jobs.artifacts import open_artifact
from horovod_jobs.early import rank_hint
from horovod_jobs.report import collect, render_html
from tests.integration.support import TINY, WORLD, events, run, stage, start, valid_manifest, wait_for
from tests.support import SmallNet

JOB = (
    *TINY,
    *WORLD,
    "model._target_=tests.integration.test_balance.Paced",
    "strategy.balance=throughput",
    "strategy.balance_every=5",
    "fit.checkpoint_every_steps=7",
)


class Paced(SmallNet):
    """Asleep for 2 ms a sample on rank 0 and for 4 ms on the others."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(len(x) * (0.002 if rank_hint() == 0 else 0.004))
        return super().forward(x)


def balance(cwd: Path) -> dict[str, Any]:
    """What the artifact tells of the shares."""
    path = next((cwd / "artifacts").glob("model-*"))
    told: dict[str, Any] = open_artifact(path).meta["details"]["exchange"]["balance"]
    return told


def test_a_slow_rank_gets_less_and_the_report_shows_it(tmp_path: Path) -> None:
    done = run(*JOB, "fit.epochs=4", cwd=tmp_path)
    assert done.code == 0, done.text
    assert stage(valid_manifest(tmp_path), "model")["metrics"]["steps"] == 40
    told = balance(tmp_path)
    assert told["shares"] == pytest.approx([2 / 3, 1 / 3], abs=0.12)
    page = render_html(collect(tmp_path / "runs" / "latest"))
    assert "<h2>Shares of the batch by rank</h2>" in page
    assert "rank 1" in page


def test_a_killed_job_goes_on_with_the_shares_it_had(tmp_path: Path) -> None:
    running = start(*JOB, "fit.epochs=8", cwd=tmp_path)
    wait_for(
        lambda: any(entry["event"] == "checkpoint" and entry["step"] >= 14 for entry in events(tmp_path)),
        what="the checkpoint of step 14",
    )
    running.kill()
    done = run(*JOB, "fit.epochs=8", cwd=tmp_path)
    assert done.code == 0, done.text
    resumed = stage(valid_manifest(tmp_path), "model")["resumed_from_step"]
    assert 14 <= resumed < 80
    history = balance(tmp_path)["history"]
    before = [entry for entry in history if entry["step"] <= resumed]
    after = [entry for entry in history if entry["step"] > resumed]
    assert before[-1]["shares"][0] > 0.55
    assert after[0]["shares"][0] > 0.55, "it did not start evenly again"
