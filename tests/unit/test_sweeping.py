"""A sweep's jobs are all checked before the first one runs, and an error names its job."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from horovod_jobs import sweeping
from horovod_jobs.app import conf_dir
from horovod_jobs.errors import ConfigError, NonFiniteError
from horovod_jobs.job import register_schema


@pytest.fixture
def sweeper() -> Iterator[Any]:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"), sweeping.checked():
        config = compose("config", return_hydra_config=True, overrides=["graph=train"])
        with open_dict(config):
            config.hydra.mode = RunMode.MULTIRUN
        yield SimpleNamespace(
            config=config, hydra_context=SimpleNamespace(config_loader=GlobalHydra.instance().config_loader())
        )
    HydraConfig.instance().cfg = None


COMMON = ["graph=train", "data=digits", "footprint=none"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("fit.epochs=0", "stages.model.fit.epochs=0 is too small; use 1 or more"),
        ("fit.epochs=many", "fit.epochs=many is not a whole number; use one such as 3"),
    ],
)
def test_the_first_job_waits_until_all_are_checked(sweeper: Any, bad: str, said: str) -> None:
    batch = [[*COMMON, "fit.epochs=1", "seed=8"], [*COMMON, bad, "seed=8"], [*COMMON, "fit.epochs=2", "seed=9"]]
    with pytest.raises(ConfigError) as caught:
        Sweeper.validate_batch_is_legal(sweeper, batch)
    assert str(caught.value).startswith(f"job 2 of 3 ({bad} seed=8): {said}")
    assert str(caught.value).endswith("; none of the 3 jobs was started")


def test_an_error_on_the_way_names_its_job_and_those_not_tried(
    sweeper: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Sweeper.validate_batch_is_legal(sweeper, [[*COMMON, f"seed={seed}"] for seed in (1, 2, 3)])
    error = NonFiniteError("the loss is nan")
    said = {0: "2 more not tried", 1: "1 more not tried", 2: ""}
    for number, rest in said.items():
        HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "job": {"num": number}}})
        told = sweeping.of_job(error)
        assert isinstance(told, NonFiniteError)
        assert str(told) == f"job {number + 1} of 3 (seed={number + 1}): the loss is nan" + (
            f"; {rest}" if rest else ""
        )
    sweeping.tell_end(8)
    assert capsys.readouterr().err == "error: job 3 of 3 (seed=3) ended with exit code 8\n"


def test_a_job_that_is_none_of_a_sweep_keeps_its_error() -> None:
    HydraConfig.instance().cfg = None
    error = ConfigError("no")
    assert sweeping.of_job(error) is error
