"""The click-through job as a person starts it, on the real data where a package or folder has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import horovod_jobs
from horovod_jobs.data import movielens as data_module
from horovod_jobs.data.base import DataModule
from horovod_jobs.data.categorical import IdSplit
from horovod_jobs.data.movielens import movielens
from tests.integration.support import WORLD, run, stage, valid_manifest

FOUND = next((folder for folder in data_module.folders() if data_module.complete(folder)), None)
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        FOUND is None,
        reason="MovieLens-100k is not here: launch/install.sh gets it, or put u.data, u.item and u.user in $HOROVOD_JOBS_DATA/ml-100k",
    ),
]
LONG_S = 800.0  # A quiet machine trains for about a minute.
QUIET = ("footprint=none", "tracker=none", "run.progress=none")


def one_hot(split: IdSplit, data: DataModule) -> scipy.sparse.csr_matrix:
    """What the model is told, as 0 and 1: every id but the padding of a field of several columns."""
    starts = np.cumsum([0, *(size for _, size, _ in data.fields)])
    field = np.repeat(np.arange(len(data.fields)), [columns for _, _, columns in data.fields])
    several = np.array([columns > 1 for _, _, columns in data.fields])[field]
    ids = split.inputs.numpy()
    rows, columns = np.nonzero((ids != 0) | ~several)
    return scipy.sparse.csr_matrix(
        (np.ones(len(rows)), (rows, (ids + starts[field])[rows, columns])), shape=(len(ids), starts[-1])
    )


def logistic_regression(data: DataModule) -> float:
    """The test AUC of a logistic regression on the training part, its strength chosen on the validation part."""
    assert isinstance(data.train, IdSplit)
    assert isinstance(data.test, IdSplit)
    assert isinstance(data.validation, IdSplit)
    features, targets = one_hot(data.train, data), data.train.targets.numpy()
    scored = []
    for strength in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        model = LogisticRegression(C=strength, max_iter=1000).fit(features, targets)
        found = [
            roc_auc_score(split.targets.numpy(), model.decision_function(one_hot(split, data)))
            for split in (data.validation, data.test)
        ]
        scored.append(found)
    return float(max(scored)[1])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["random", "time"])
def test_the_model_against_a_logistic_regression(split: str, tmp_path: Path) -> None:
    """Two ranks, the settings of the experiment, the same parts and the same columns for both (docs/click_through.md has the figures)."""
    experiment = "experiment=ctr" if split == "random" else "experiment=ctr_time"
    off = (
        "stages.int8.enabled=false",
        "stages.eval_int8.enabled=false",
        "stages.eval_onnx.enabled=false",
        "stages.eval_model.latency_runs=5",
    )
    done = run(
        experiment,
        *WORLD,
        *QUIET,
        *off,
        cwd=tmp_path,
        timeout_s=LONG_S,
        env={"HOROVOD_JOBS_DATA": str(FOUND.parent)},
    )  # type: ignore[union-attr]
    assert done.code == 0, done.text
    found = stage(valid_manifest(tmp_path), "eval_model")["metrics"]
    assert found["auc_error_bound"] < 1e-3
    data = movielens(str(FOUND), split=split, history=split == "time")
    assert found["auc"] > logistic_regression(data) + found["auc_error_bound"]


SMALL = ("experiment=ctr", "fit.epochs=1", "fit.max_steps=40", "stages.eval_model.latency_runs=5",
         "stages.eval_int8.latency_runs=5", "stages.eval_onnx.latency_runs=5",
         "stages.int8.max_drop=null", "stages.int8.check_samples=500")  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a short job has run in two ranks, with sparse gradients."""
    directory = tmp_path_factory.mktemp("ctr")
    done = run(
        *SMALL,
        *WORLD,
        *QUIET,
        "model.sparse=true",
        cwd=directory,
        timeout_s=LONG_S,
        env={"HOROVOD_JOBS_DATA": str(FOUND.parent)},
    )  # type: ignore[union-attr]
    assert done.code == 0, done.text
    assert "Warning" not in done.err, done.text
    return directory


def test_the_whole_graph_runs_and_the_figures_hang_together(job: Path) -> None:
    told = valid_manifest(job)
    assert {entry["name"]: entry["status"] for entry in told["stages"]} == dict.fromkeys(
        ("model", "int8", "eval_model", "eval_int8", "eval_onnx", "export", "report"), "ran"
    )
    for name in ("eval_model", "eval_int8", "eval_onnx"):
        metrics = stage(told, name)["metrics"]
        assert 0.5 < metrics["auc"] < 1
        assert 0.5 < metrics["calibration"] < 1.5
        assert 0 < metrics["loss"] < 0.8
    drop = stage(told, "int8")["metrics"]
    assert drop["drop_points"] == pytest.approx(100 * (drop["fp32_auc"] - drop["int8_auc"]))
    assert "validation_auc" in stage(told, "model")["metrics"]


def test_the_report_speaks_of_auc(job: Path) -> None:
    text = (job / "runs" / "latest" / "report.html").read_text(encoding="utf-8")
    auc = stage(valid_manifest(job), "eval_int8")["metrics"]["auc"]
    assert f"AUC {auc:.4f}" in text
    for words in ("AUC against size and latency", "Log loss", "Calibration", "95&nbsp;% interval of an AUC"):
        assert words.replace("&nbsp;", " ") in text.replace("\N{NO-BREAK SPACE}", " "), words
    assert "classifies" not in text
    card = (job / "runs" / "latest" / "model_card.md").read_text(encoding="utf-8")
    assert "roc_auc" in card
    assert "tabular-classification" in card


def test_the_export_runs_on_ids(job: Path) -> None:
    bundle = next((job / "artifacts").glob("export-*"))
    assert json.loads((bundle / "config.json").read_text())["input_dtype"] == "int64"
    ids = movielens(str(FOUND)).test.fetch(torch.arange(70)).inputs
    ours, onnx = horovod_jobs.load(bundle), horovod_jobs.load(bundle / "model.onnx")
    torch.testing.assert_close(ours(ids), onnx(ids), rtol=0, atol=1e-4)
    assert "user (0 to 943)" in (bundle / "README.md").read_text(encoding="utf-8")


def test_another_split_is_not_the_same_ids(job: Path) -> None:
    """A model is not evaluated on ids that mean something else."""
    path = stage(valid_manifest(job), "model")["artifact"]
    done = run(
        *SMALL, *QUIET, "data.split=time", "stages.model.enabled=false", "stages.int8.enabled=false",
        "stages.export.enabled=false", f"stages.eval_model.needs.model=artifacts/{path}",
        cwd=job, timeout_s=LONG_S, env={"HOROVOD_JOBS_DATA": str(FOUND.parent)},  # type: ignore[union-attr]
    )  # fmt: skip
    assert done.code == 2, done.text
    assert "choose the data set, and its split, that it was trained on" in done.err
