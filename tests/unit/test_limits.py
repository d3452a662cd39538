"""Every number of the schema has a limit, the defaults pass, and what is refused says what to use."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass

import pytest

from horovod_jobs import config
from horovod_jobs.config import STAGES, FitConfig, LaunchConfig, RunConfig, StageConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.limits import LIMITS, Limit, check_finite, check_numbers, check_places

SCHEMA = [value for value in vars(config).values() if isinstance(value, type) and is_dataclass(value)]


def test_every_number_of_the_schema_has_a_limit() -> None:
    missing = []
    for cls in SCHEMA:
        known = {key for base in cls.__mro__ for key in LIMITS.get(base, {})}
        numbers = {
            entry.name for entry in fields(cls) if set(str(entry.type).split(" | ")) & {"int", "float", "list[int]"}
        }
        missing += [f"{cls.__name__}.{name}" for name in sorted(numbers - known)]
    assert len(SCHEMA) > 10
    assert missing == []


def test_every_limit_is_of_a_key() -> None:
    for cls, limits in LIMITS.items():
        assert set(limits) <= {entry.name for entry in fields(cls)}


def test_the_defaults_pass() -> None:
    for cls in SCHEMA:
        if issubclass(cls, StageConfig):
            continue  # Their seed and fit are the job's, which the composed configs of test_configs resolve.
        check_numbers(cls())
    for cls in STAGES.values():
        check_numbers(cls(seed=0, **({"fit": FitConfig()} if hasattr(cls, "strategy") else {})), where="stages.x")


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        (Limit(1), 0, "is too small; use 1 or more"),
        (Limit(0), -1, "is negative; use 0 or more"),
        (Limit(0, strict=True), 0.0, "is not positive; use more than 0"),
        (Limit(0, 1, strict=True, advice="0.9"), 1.0, "is not between 0 and 1; use 0.9"),
        (Limit(0, 5), 6, "is too large; use 5 or less"),
        (Limit(0, 5), 5, ""),
        (Limit(1), 1, ""),
    ],
)
def test_a_limit_says_what_to_use(limit: Limit, value: float, said: str) -> None:
    assert limit.refuses(value) == said


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (LaunchConfig(elastic=config.ElasticConfig(beat_s=0)), "x.elastic.beat_s=0 is not positive; use more than 0"),
        (RunConfig(stall_limit_s=-1), "x.stall_limit_s=-1 is not positive; use more than 0, or null"),
    ],
)
def test_the_key_is_named_with_its_section(section: object, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        check_numbers(section, where="x")
    assert str(told.value) == message


def test_nan_is_found_wherever_it_is() -> None:
    check_finite({"a": [1.0, {"b": 2}], "c": None, "d": "nan"})
    with pytest.raises(ConfigError, match=r"a\.b\[1\]\.c=nan is not a finite number"):
        check_finite({"a": {"b": [1.0, {"c": math.nan}]}})


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"root": ""}, "run.root= is empty; name a directory, or leave it out for runs"),
        ({"store": " "}, "run.store= is empty; name a directory, or leave it out for artifacts"),
        ({"id": ""}, "run.id= is not a directory name; use letters, digits, dashes, underscores and dots"),
        ({"id": "a b"}, "run.id=a b is not a directory name; use letters, digits"),
        ({"id": "../evil"}, "run.id=../evil is not a directory name"),
        ({"id": ".hidden"}, "a letter or digit first, or leave it out"),
        ({"id": "latest"}, "run.id=latest is not a directory name of its own"),
        ({"id": "mine\n"}, "is not a directory name"),
    ],
)
def test_a_run_is_written_where_a_name_leads(run: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_places(RunConfig(**run))
    assert said in str(caught.value)


def test_names_of_runs_that_pass() -> None:
    for name in (None, "one", "20261128-012719-ab12", "A_b-3.4"):
        check_places(RunConfig(id=name))
