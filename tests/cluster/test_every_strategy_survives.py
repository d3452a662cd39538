"""Faults one after the other, under every way to combine gradients: the job ends in the weights of the untouched run."""

from __future__ import annotations

from pathlib import Path

import pytest

from horovod_jobs.chaos import strikes
from tests.integration.support import TINY, WORLD, events, left_behind, manifest, run, weights
from tests.integration.test_faults import schedule

LONG = (*TINY, "fit.epochs=12", "fit.checkpoint_every_steps=20")
SERVERS = ("strategy=parameter_server", "strategy.chunk_kb=2", "model.dropout=0", "fit.sync_batchnorm=false")
SOAK = ("launch.restarts=5", "run.silent_limit_s=4", "run.stall_limit_s=20")
FAULTS = [("kill", 0, 30), ("stop", 1, 50), ("exception", 1, 70), ("disk", 0, 90)]

EXACT = {
    "adasum": ("strategy.op=adasum",),
    "bf16": ("strategy=bf16",),
    "topk": ("strategy=topk", "strategy.compression.min_elements=100"),
    "randomk": ("strategy=randomk", "strategy.compression.min_elements=100"),
    "onebit": ("strategy=onebit", "strategy.compression.min_elements=100"),
    "qsgd": ("strategy=qsgd", "strategy.compression.min_elements=100"),
    "powersgd": ("strategy=powersgd", "strategy.compression.min_elements=100"),
    "local_sgd": ("strategy=local_sgd", "fit.sync_batchnorm=false"),
    "colocated": (*SERVERS, "strategy.servers=colocated"),
    "dedicated": (*SERVERS, "launch.np=3"),
}
ROUGH = {
    "balance": ("strategy.balance=throughput", "strategy.balance_every=5"),
    "averaging weights": (*SERVERS, "launch.np=3", "strategy.averaging=weights"),
}


def soak(directory: Path, *overrides: str) -> None:
    """Strike the job, one fault after the other, until it has come to its end."""
    job = (*LONG, *WORLD, *overrides, *SOAK, "chaos=kills", schedule(*FAULTS))
    done = run(*job, cwd=directory, timeout_s=400)
    assert done.code == 6, done.text  # A full disk is for a person to mend.
    assert "No space left on device" in done.err
    assert weights(directory) == {}, "nothing is published of a job that is not through"
    again = run(*job, cwd=directory, timeout_s=400)
    assert again.code == 0, again.text
    told = strikes(directory / "runs" / "chaos.jsonl")
    assert [(entry["fault"], entry["rank"], entry["step"]) for entry in told] == FAULTS
    assert manifest(directory)["status"] == "done"
    assert left_behind(directory) == []


def losses(directory: Path) -> list[float]:
    return [entry["train_loss"] for entry in events(directory) if entry["event"] == "epoch"]


@pytest.mark.parametrize("name", EXACT)
def test_the_weights_are_those_of_the_untouched_run(name: str, tmp_path: Path) -> None:
    done = run(*LONG, *WORLD, *EXACT[name], cwd=tmp_path)
    assert done.code == 0, done.text
    wanted = weights(tmp_path)
    struck = tmp_path / "struck"
    struck.mkdir()
    soak(struck, *EXACT[name])
    assert weights(struck) == wanted, "bit for bit the same"


@pytest.mark.parametrize("name", ROUGH)
def test_the_loss_is_that_of_the_untouched_run(name: str, tmp_path: Path) -> None:
    done = run(*LONG, *WORLD, *ROUGH[name], cwd=tmp_path)
    assert done.code == 0, done.text
    struck = tmp_path / "struck"
    struck.mkdir()
    soak(struck, *ROUGH[name])
    assert losses(struck)[-1] == pytest.approx(losses(tmp_path)[-1], rel=0.1)
