"""A host, an environment and a job to plan with, and the comparison with a golden file."""

from __future__ import annotations

import os
from pathlib import Path

from horovod_jobs.launch.base import Host, JobCommand

HOST = Host(python="/venv/bin/python", mpirun="/venv/bin/mpirun", has_mpi4py=True,
            has_horovod=True, cores=8, is_root=False)  # fmt: skip
ENVIRON = {"PATH": "/usr/bin", "HOME": "/home/me", "HOSTNAME": "login", "TMPDIR": "/tmp/me", "AWS_SECRET_ACCESS_KEY": "secret",
           "HOROVOD_CYCLE_TIME": "2", "LC_ALL": "C", "OMPI_MCA_pml": "ucx", "MY_TOKEN": "hidden-value"}  # fmt: skip
GOLDEN = Path(__file__).parent / "golden"


def job(name: str = "main", *, number: int | None = None) -> JobCommand:
    """What a person typed, with a space in it, and a number where it is one of a sweep."""
    arguments = ["--config-name=config", "experiment=main", "name=two words"]
    arguments += [] if number is None else [f"seed={number}"]
    config = {"run": {"root": "runs", "store": "artifacts"}}
    return JobCommand(name, (*arguments, "launch=none"), ("horovod-jobs", "experiment=main"), config)


def golden(name: str, text: str) -> None:
    """Hold a text to the file; with HOROVOD_JOBS_WRITE_GOLDEN=1 it is written instead, and the test fails to say so."""
    path = GOLDEN / name
    if os.environ.get("HOROVOD_JOBS_WRITE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
        raise AssertionError(f"{path} was written; look at it, and run the test without HOROVOD_JOBS_WRITE_GOLDEN")
    assert text == path.read_text(encoding="utf-8")
