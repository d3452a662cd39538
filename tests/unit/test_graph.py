"""Order, wiring errors, switching off, fingerprints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_jobs.config import (
    DistillStage,
    EvaluateStage,
    ExportStage,
    FitConfig,
    QuantizeStage,
    ReportStage,
    StageConfig,
    TrainStage,
)
from horovod_jobs.errors import ConfigError
from horovod_jobs.graph import Node, build, fingerprint


def graph(**changes: StageConfig) -> dict[str, StageConfig]:
    stages: dict[str, StageConfig] = {
        "report": ReportStage(needs={"teacher": "eval_teacher", "int8": "eval_int8"}),
        "eval_int8": EvaluateStage(needs={"model": "int8"}),
        "eval_teacher": EvaluateStage(needs={"model": "teacher"}),
        "int8": QuantizeStage(needs={"model": "student"}),
        "student": DistillStage(needs={"teacher": "teacher"}),
        "teacher": TrainStage(),
    }
    return {**stages, **changes}


def test_every_stage_comes_after_what_it_needs() -> None:
    nodes = build(graph())
    place = {node.name: index for index, node in enumerate(nodes)}
    assert len(place) == 6
    assert all(place[source] < place[node.name] for node in nodes for source in node.needs.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": DistillStage()}, "stages.student.needs.teacher is missing; name a stage that makes a model"),
        ({"student": DistillStage(needs={"teacher": "techer"})}, "needs.teacher=techer names no stage; there are"),
        (
            {"student": DistillStage(needs={"teacher": "eval_teacher"})},
            "an evaluate stage makes an evaluation.*takes model",
        ),
        (
            {"int8": QuantizeStage(needs={"model": "int8b"}), "int8b": QuantizeStage(needs={"model": "teacher"})},
            "makes a quantized",
        ),
        ({"teacher": TrainStage(needs={"model": "student"})}, "a train stage has no input 'model'; it takes init"),
        ({"teacher": TrainStage(needs={"init": "student"})}, r"in a circle \(.*teacher.*student.*\)"),
        ({"teacher": TrainStage(needs={"init": "teacher"})}, r"in a circle \(teacher -> teacher\)"),
        ({"export": ExportStage(needs={"model": "report"})}, "a report stage makes a report"),
    ],
)
def test_wrong_wiring_is_named(changes: dict[str, StageConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(graph(**changes))


def test_switching_off_spreads_to_those_that_cannot_do_without() -> None:
    off = {node.name: node for node in build(graph(int8=QuantizeStage(enabled=False, needs={"model": "student"})))}
    assert off["int8"].off == "it is switched off (enabled=false)"
    assert off["eval_int8"].off == "it needs int8, which is off"
    assert off["report"].off is None
    assert off["report"].needs == {"teacher": "eval_teacher"}
    everything = {node.name: node.off for node in build(graph(teacher=TrainStage(enabled=False)))}
    assert all(everything.values())
    assert everything["report"] == "everything it needs is off"


def test_the_onnx_file_that_an_export_leaves_out_is_not_evaluated() -> None:
    for onnx, source, off in ((True, "student", False), (False, "student", True), (False, "int8", False)):
        stages = {
            "export": ExportStage(needs={"model": source}, onnx=onnx),
            "eval_onnx": EvaluateStage(needs={"model": "export"}, format="onnx"),
        }
        node = next(node for node in build(graph(**stages)) if node.name == "eval_onnx")
        assert (node.off is not None) == off
        assert node.off is None or "onnx=false" in node.off


def print_of(stage: StageConfig, **given: Any) -> str:
    settings: dict[str, Any] = {
        "inputs": {},
        "data_digest": "d",
        "code": {},
        "world_size": 1,
        "global_batch": 128,
        **given,
    }
    return fingerprint(Node("x", stage), **settings)


def test_what_does_not_change_the_result_is_not_in_the_fingerprint() -> None:
    stage = TrainStage(seed=0, fit=FitConfig(), strategy={"_target_": "s", "tune": True, "compression": "none"})
    same = print_of(stage, tuning_keys=frozenset({"tune"}))
    assert print_of(replace(stage, enabled=True, force=True), tuning_keys=frozenset({"tune"})) == same
    assert print_of(stage, world_size=4, tuning_keys=frozenset({"tune"})) == same
    faster = replace(stage, strategy={"_target_": "s", "tune": False, "compression": "none"})
    assert print_of(faster, tuning_keys=frozenset({"tune"})) == same
    assert print_of(replace(stage, fit=replace(stage.fit, checkpoint_every_s=1.0, log_every_steps=7, workers=3)),
                    tuning_keys=frozenset({"tune"})) == same  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"augment": False},
        {"model": {"_target_": "m"}},
        {"fit": FitConfig(epochs=3)},
        {"strategy": {"compression": "fp16"}},
    ],
)
def test_what_changes_the_result_is(change: dict[str, Any]) -> None:
    stage = TrainStage(seed=0, fit=FitConfig(), strategy={"compression": "none"})
    assert print_of(replace(stage, **change)) != print_of(stage)


def test_inputs_data_code_and_machine_are_in_it() -> None:
    stage = EvaluateStage(seed=0)
    first = print_of(stage)
    for other in ({"inputs": {"model": "f"}}, {"data_digest": "e"}, {"code": {"a": "b"}}, {"machine": "other CPU"}):
        assert print_of(stage, **other) != first
    local = TrainStage(seed=0, fit=FitConfig(sync_batchnorm=False), strategy={})
    assert print_of(local, world_size=2) != print_of(local, world_size=1)


@given(st.permutations(list(graph())))
def test_the_order_of_writing_does_not_matter(names: list[str]) -> None:
    stages = graph()
    nodes = build({name: stages[name] for name in names})
    place = {node.name: index for index, node in enumerate(nodes)}
    assert all(place[source] < place[node.name] for node in nodes for source in node.needs.values())
