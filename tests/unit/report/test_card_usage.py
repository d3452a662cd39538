"""The model card's code runs as it stands, for a model of one's own and in a store of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from horovod_jobs.artifacts import ArtifactStore
from horovod_jobs.predict import save_model
from horovod_jobs.preprocessing import Preprocessing
from horovod_jobs.report import collect, render_model_card
from tests.support import SMALL_NET, SmallNet

HOW = Preprocessing(255.0, 0.3, 0.25)


@pytest.mark.parametrize("how", [None, HOW])
@pytest.mark.parametrize("store", ["artifacts", "elsewhere/my store"])
def test_the_cards_code_runs(sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, how) -> None:
    run_dir = sample.write_sample(tmp_path)
    data = collect(run_dir)
    kept = ArtifactStore(tmp_path / store)
    staging = kept.staging("model", "ef" * 32)
    net = SmallNet(num_classes=3, input_shape=(1, 6, 6))
    shape = (1, 6, 6)
    save_model(
        staging, net, model_node=SMALL_NET, num_classes=3, input_shape=shape, class_names="abc", preprocessing=how
    )
    artifact = kept.publish(staging, kind="model", fingerprint="ef" * 32, meta={})
    rows = [*data.models[:3], replace(data.models[3], path=artifact.path)]
    mine = replace(data, models=rows, config={**data.config, "allow_targets": ["other", "tests.support"]})
    monkeypatch.chdir(tmp_path)
    card = render_model_card(mine)
    (code,) = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    found: dict[str, object] = {}
    exec(code, found)
    assert torch.is_tensor(found["logits"])
    assert f'load("{store}/model-' in code
    assert 'allow_targets=["tests.support"]' in code
    assert ("model.prepare(raw)" in code) is (how is not None)


def test_the_store_is_the_runs_own(sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = sample.write_sample(tmp_path / "job")
    (tmp_path / "job" / "artifacts").rename(tmp_path / "kept")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps({**manifest, "store": "../../../kept"}))
    monkeypatch.chdir(tmp_path)
    card = render_model_card(collect(run_dir))
    assert 'load("kept/quantized-' in card
    assert "allow_targets" not in card.split("```python")[1].split("```")[0]
    monkeypatch.chdir(run_dir)
    assert f'load("{tmp_path / "kept"}/quantized-' in render_model_card(collect(run_dir))


def test_license_and_title_are_the_configs(sample, tmp_path: Path) -> None:
    stage = {"kind": "report", "needs": sample.NEEDS["report"], "license": "apache-2.0", "title": "A title"}
    data = collect(sample.write_sample(tmp_path, stages={"report": stage}))
    assert (data.license, data.title) == ("apache-2.0", "A title")
    assert "license: apache-2.0" in render_model_card(data)
    assert "# A title" in render_model_card(data)


def test_a_model_that_is_gone_has_no_usage(sample, tmp_path: Path) -> None:
    data = collect(sample.write_sample(tmp_path))
    (data.final.path / "config.json").unlink()
    assert "How to use it" not in render_model_card(data)
