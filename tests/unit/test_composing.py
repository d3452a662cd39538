"""What Hydra refuses, told to the person who typed it: key, value, what was expected."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from horovod_jobs.app import conf_dir
from horovod_jobs.composing import composing_error, options_first
from horovod_jobs.job import register_schema


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("fit.epochs=abc", "not a whole number; use one such as 3"),
        ("fit.epochs=1.5", "not a whole number; use one such as 3"),
        ("fit.epochs=", "not a whole number; use one such as 3"),
        ("launch.grace_s=soon", "not a number; use one such as 0.5"),
        ("plan=maybe", "neither true nor false; use one of the two"),
        ("fit.epochs=null", "no value for this key, which cannot be null; leave it out for its default"),
        ("launch.env=3", "not a list; write it as [A,B]"),
        ("run.id=[a]", "not a text; give a single value"),
        ("fit=3", "not a section; set one of its keys instead"),
    ],
)
def test_a_value_of_the_wrong_type(typed: str, said: str) -> None:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("config", overrides=["graph=train", typed])
    assert composing_error(caught.value) == f"{typed} is {said}"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("debug=fast --config-dir conf plan=true", "--config-dir conf debug=fast plan=true"),
        ("debug=fast -m seed=1,2", "-m debug=fast seed=1,2"),
        ("a=1 --cfg job b=2 -p fit", "--cfg job -p fit a=1 b=2"),
        ("a=1 --config-dir=conf ~b", "--config-dir=conf a=1 ~b"),
        ("a=1 --info searchpath b=2", "--info searchpath a=1 b=2"),
        ("a=1 -- -b --cfg", "a=1 -- -b --cfg"),
        ("a=-1 --help", "--help a=-1"),
        ("", ""),
        ("a=1 --config-dir", "a=1 --config-dir"),
    ],
)
def test_an_option_may_stand_between_overrides(typed: str, read: str) -> None:
    assert options_first(typed.split()) == read.split()
