"""Which launcher started us, and how the loss of another rank is told."""

from __future__ import annotations

import pytest

from horovod_jobs.comm.connect import launched_by, world_lost
from horovod_jobs.early import rank_hint
from horovod_jobs.errors import DataError, NonFiniteError, WorldError


@pytest.mark.parametrize(
    ("environ", "launcher", "rank"),
    [
        ({}, "none", 0),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpi", 1),
        ({"PMIX_RANK": "3"}, "mpi", 3),
        ({"HOROVOD_CONTROLLER": "gloo", "HOROVOD_RANK": "2"}, "gloo", 2),
        ({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"}, "gloo", 0),
        ({"HOROVOD_FUSION_THRESHOLD": "0", "SLURM_PROCID": "0"}, "none", 0),
    ],
)
def test_the_launcher_is_known_by_its_variables(environ: dict[str, str], launcher: str, rank: int) -> None:
    assert launched_by(environ) == launcher
    assert rank_hint(environ) == rank


def test_only_horovods_own_errors_mean_a_lost_rank() -> None:
    internal = type("HorovodInternalError", (RuntimeError,), {"__module__": "horovod.common.exceptions"})
    found = world_lost(internal("Horovod has been shut down. This was caused by\nsomething"))
    assert isinstance(found, WorldError)
    assert "another rank has ended" in str(found)
    assert "\n" not in str(found)
    assert world_lost(RuntimeError("Horovod has been shut down")) is not None
    for other in (DataError("x"), NonFiniteError("x"), RuntimeError("x"), KeyboardInterrupt()):
        assert world_lost(other) is None
