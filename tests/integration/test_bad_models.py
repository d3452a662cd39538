"""Models that do not belong to the job: of another data set, of another kind, damaged, or worse than a gate allows."""

# ruff: noqa: E501 (a row of a table is easier to read on one line)

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from horovod_jobs.artifacts import ArtifactStore
from tests.integration.support import (
    PAIR_OF,
    TINY,
    WORLD,
    Forks,
    check,
    damage,
    left_behind,
    model_in,
    run,
    run_directories,
    stage,
    valid_manifest,
    weights,
)

# fmt: off
STRANGERS: dict[str, tuple[str, str]] = {
    # another data set than the teacher's: override, what the line says
    "fewer classes": ("data.classes=3", r"has 4 classes and inputs \[1, 6, 6\], the data set 3 classes and inputs \[1, 6, 6\]"),
    "other inputs": ("data.side=8", r"has 4 classes and inputs \[1, 6, 6\], the data set 4 classes and inputs \[1, 8, 8\]"),
    "other names": ("+data.names=[a,b,c,d]", r"tells other classes apart \('class 0' where the data set has 'a'\)"),
}
# fmt: on


@pytest.mark.parametrize("what", STRANGERS)
def test_a_teacher_of_another_data_set(what: str, forks: Forks, trained: Path, tmp_path: Path) -> None:
    override, pattern = STRANGERS[what]
    model = model_in(trained)
    overrides = (*PAIR_OF[:2], PAIR_OF[2] % model, override)
    pattern = (
        rf"stages\.student\.needs\.teacher=\S+: teacher {model.name} \(stage model\) {pattern}; choose the data set"
    )
    for plan in ("true", "false"):
        check(forks.run(*TINY, *overrides, f"plan={plan}", cwd=tmp_path), code=2, pattern=pattern)
    assert run_directories(tmp_path) == []


@pytest.mark.parametrize("kind", ["evaluate", "quantize", "export"])
def test_a_model_of_another_data_set(kind: str, forks: Forks, trained: Path, tmp_path: Path) -> None:
    more = ", calibration_samples: 9" if kind == "quantize" else ""
    override = f"+stages.m={{kind: {kind}, needs: {{model: {model_in(trained)}}}{more}}}"
    done = forks.run(*TINY, override, "data.classes=3", cwd=tmp_path)
    check(done, code=2, pattern=r"stages\.m\.needs\.model=\S+: model-\w+ \(stage model\) has 4 classes")
    assert run_directories(tmp_path) == []


# fmt: off
GATES: dict[str, tuple[str, str]] = {
    "export": ("{kind: export, needs: {model: model}, tolerance: 1e-30}", r"stages\.g: the ONNX outputs differ from torch's by up to \S+, and tolerance=1e-30; allow it by"),
    "int8": ("{kind: quantize, needs: {model: model}, calibration_samples: 64, quantizer: {_target_: tests.integration.parts.TurnsRound}}", r"stages\.g: int8 accuracy .* points below fp32's .*, and max_drop=0\.5; calibrate with more samples"),
}
# fmt: on


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_a_result_that_does_not_pass_its_gate(gate: str, ranks: int, forks: Forks, tmp_path: Path) -> None:
    node, pattern = GATES[gate]
    job = (*TINY, f"+stages.g={node}")
    done = forks.run(*job, cwd=tmp_path) if ranks == 1 else run(*job, *WORLD, cwd=tmp_path)
    check(done, code=7, pattern=pattern)
    told = valid_manifest(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 7)
    assert (stage(told, "model")["status"], stage(told, "g")["status"]) == ("ran", "failed")
    assert not list((tmp_path / "artifacts").glob("export-*")) + list((tmp_path / "artifacts").glob("quantized-*"))
    assert left_behind(tmp_path) == []


def test_start_weights_of_another_model(forks: Forks, trained: Path, tmp_path: Path) -> None:
    done = forks.run(*TINY, "model=mlp", f"+stages.model.needs.init={model_in(trained)}", cwd=tmp_path)
    check(done, code=4, pattern=r"needs\.init=model-\w+ holds weights of another model")


@pytest.mark.parametrize("how", ["cut", "index", "flipped", "gone"])
def test_a_damaged_artifact_given_by_path(how: str, forks: Forks, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / model_in(trained).name
    shutil.copytree(model_in(trained), copy)
    file = copy / ("artifact.json" if how == "index" else "model.safetensors")
    damage(file, how)
    done = forks.run(*TINY, f"+stages.model.needs.init={copy}", cwd=tmp_path)
    check(done, code=4, pattern=rf"damaged \({file.name}: ")


def test_an_artifact_of_the_wrong_kind_given_by_path(forks: Forks, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "other")
    staging = store.staging("evaluation", "ab" * 32)
    (staging / "evaluation.json").write_text("{}", encoding="utf-8")
    artifact = store.publish(staging, kind="evaluation", fingerprint="ab" * 32, meta={})
    done = forks.run(*TINY, f"+stages.model.needs.init={artifact.path}", cwd=tmp_path)
    check(done, code=2, pattern=r"needs\.init=\S+ is an evaluation artifact, and 'init' of a train stage takes model")


@pytest.mark.parametrize("how", ["cut", "index", "flipped", "gone"])
def test_a_damaged_artifact_in_the_store_is_named_and_made_again(
    how: str, forks: Forks, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "artifacts", tmp_path / "artifacts")
    before = weights(trained)
    file = "artifact.json" if how == "index" else "model.safetensors"
    damage(model_in(tmp_path) / file, how)
    done = forks.run(*TINY, "fit.epochs=1", cwd=tmp_path)
    assert done.code == 0, done.text
    assert re.search(rf"model: running \(artifact .*damaged \({file}: ", done.err), done.text
    assert weights(tmp_path) == before
    assert left_behind(tmp_path) == []
    assert stage(valid_manifest(tmp_path), "model")["status"] == "ran"
