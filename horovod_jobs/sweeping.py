"""The jobs of a sweep (``-m``): all are checked before the first one runs, and an error says whose it is and what was not tried."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from horovod_jobs.composing import composing_error
from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.job import resolve

_jobs: list[list[str]] = []  # The overrides of each job, in the order in which they run.


@contextmanager
def checked() -> Iterator[None]:
    """For the time of the body, Hydra's sweeper holds every job of a batch to the schema's rules, where it only composes them itself."""
    _jobs.clear()
    before = Sweeper.validate_batch_is_legal
    Sweeper.validate_batch_is_legal = _check  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = before  # type: ignore[method-assign, assignment]


def _check(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    first = len(_jobs)
    _jobs.extend(list(overrides) for overrides in batch)
    for number in range(first, len(_jobs)):
        try:
            resolve(_composed(sweeper, number))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_refused(number, composing_error(error))) from error
        except JobError as error:
            raise type(error)(_refused(number, str(error))) from error


def _composed(sweeper: Sweeper, number: int) -> DictConfig:
    """A job's config as Hydra's launcher would give it to the task."""
    assert sweeper.hydra_context is not None  # Hydra has set the sweeper up.
    assert sweeper.config is not None
    composed = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, _jobs[number])
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(composed)
        del composed["hydra"]
    return composed


def _refused(number: int, text: str) -> str:
    return f"{_named(number)}: {text}; none of the {len(_jobs)} jobs was started"


def of_job(error: JobError) -> JobError:
    """An error of the job that runs, which says so where that is one of a sweep, and how many it leaves untried."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return error
    number = int(HydraConfig.get().job.num)
    return type(error)(f"{_named(number)}: {error}{_left(number)}")


def tell_end(code: int) -> None:
    """Where a job of a sweep ran in a world of its own, whose ranks have told what was wrong: whose end that was."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        number = int(HydraConfig.get().job.num)
        print(f"error: {_named(number)} ended with exit code {code}{_left(number)}", file=sys.stderr, flush=True)


def _left(number: int) -> str:
    left = len(_jobs) - number - 1
    return f"; {left} more not tried" if left > 0 else ""


def _named(number: int) -> str:
    own = [word for word in _jobs[number] if any(word not in other for other in _jobs)] if number < len(_jobs) else []
    return f"job {number + 1} of {len(_jobs)}" + (f" ({' '.join(own)})" if own else "")
