"""Every file of conf/ composes, becomes a checked job, and names things that are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from horovod_jobs.app import conf_dir
from horovod_jobs.config import STAGES
from horovod_jobs.graph import build
from horovod_jobs.instantiate import bind, is_node
from horovod_jobs.job import Job, register_schema, resolve

CONF = Path(conf_dir())
# What a stage or the runner gives to a part besides what its node says.
INJECTED = {
    "model": ("num_classes", "input_shape"),
    "student": ("num_classes", "input_shape"),
    "task": ("num_classes",),
    "optimizer": ("params",),
}
# Groups that are not chosen by `group=option`: stage/ is what graphs are made of.
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "stage")


@pytest.fixture(scope="module", autouse=True)
def _conf() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def job(*overrides: str) -> Job:
    return resolve(compose("config", overrides=list(overrides)))


def check_targets(value: Any, where: str) -> int:
    """Bind every node in a resolved config; gives how many there were."""
    count = 0
    if is_node(value):
        bind(value, where=where, injected=INJECTED.get(where.split(".")[-1], ()))
        count += 1
    if isinstance(value, dict):
        return count + sum(check_targets(entry, f"{where}.{key}".lstrip(".")) for key, entry in value.items())
    if isinstance(value, list):
        return count + sum(check_targets(entry, where) for entry in value)
    return count


def test_the_folders_are_the_groups() -> None:
    assert OPTIONS, "conf/ was found"
    groups = {group for group, _ in OPTIONS}
    chosen = {str(next(iter(entry))).split("@")[0] for entry in _defaults() if isinstance(entry, dict)}
    assert groups == {
        group.removeprefix("override hydra/").split("/")[0] for group in chosen if not group.startswith("override")
    }
    assert {path.stem for path in (CONF / "stage").glob("*.yaml")} == set(STAGES)


def _defaults() -> list[Any]:
    import yaml

    return list(yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"])


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group: str, option: str) -> None:
    made = job(f"{group}={option}")
    assert build(made.stages)
    assert check_targets({key: value for key, value in made.resolved.items() if key != "stages"}, "") >= 8
    assert check_targets(made.resolved["stages"], "stages") >= 5


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "model"])
def test_every_model_can_be_the_student(option: str) -> None:
    made = job(f"model@student={option}")
    assert (
        made.resolved["stages"]["student"]["model"]
        == made.resolved["student"]
        == job(f"model={option}").resolved["model"]
    )


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_of_each_kind_can_be_added_by_hand(kind: str) -> None:
    roles = {"train": {}, "distill": {"teacher": "teacher"}, "report": {"student": "eval_student"}}
    needs = ", ".join(f"{role}: {source}" for role, source in roles.get(kind, {"model": "student"}).items())
    made = job(f"+stages.more={{kind: {kind}, needs: {{{needs}}}}}")
    assert made.stages["more"].kind == kind
    assert [node.name for node in build(made.stages)].count("more") == 1
    assert "${" not in str(made.resolved["stages"]["more"]), "everything is resolved"


def test_a_stage_takes_from_the_job_what_it_does_not_say() -> None:
    made = job("fit.epochs=3", "stages.student.fit.epochs=7", "optimizer.lr=0.25", "seed=5")
    fits = {name: getattr(stage, "fit", None) for name, stage in made.stages.items()}
    assert (fits["teacher"].epochs, fits["student"].epochs) == (3, 7)
    assert made.resolved["stages"]["student"]["optimizer"]["lr"] == 0.25
    assert {stage.seed for stage in made.stages.values()} == {5}


def test_every_file_says_what_it_is() -> None:
    """A comment at the top, or on a line: a config file is documentation too. One-line files name their class."""
    silent = [
        str(path.relative_to(CONF))
        for path in CONF.rglob("*.yaml")
        if "#" not in (text := path.read_text(encoding="utf-8")) and "_target_" not in text and "kind:" not in text
    ]
    assert silent == []
