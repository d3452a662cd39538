"""What a rank tells the parent that started it, and what that parent told the rank."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from horovod_jobs.early import COMMAND_VARIABLE, rank_hint
from horovod_jobs.errors import WorldError
from horovod_jobs.launch.base import usable_cores

DIRECTORY_VARIABLE = "HOROVOD_JOBS_LAUNCH_DIR"


def register_rank() -> None:
    """Let the parent know whom to pass signals to."""
    if directory := os.environ.get(DIRECTORY_VARIABLE):
        with contextlib.suppress(OSError):
            (Path(directory) / f"pid-{os.getpid()}").write_text(str(rank_hint()))


def record_exit(code: int) -> bool:
    """Tell the parent this rank's exit code, where one started it: launchers do not pass it on faithfully."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return False
    with contextlib.suppress(OSError):
        (Path(directory) / f"exit-{rank_hint():06d}").write_text(str(code))
        return True
    return False


def code_of_all(codes: Iterable[int]) -> int:
    """The job's exit code, by those that its ranks have told, lowest rank first: who missed a rank comes after a rank's own error."""
    failed = sorted((code for code in codes if code), key=lambda code: code == WorldError.exit_code)
    return failed[0] if failed else 0


def record_lost(rank: int) -> None:
    """Tell the parent that a rank has died and the job went on without it: its end is not the job's."""
    if directory := os.environ.get(DIRECTORY_VARIABLE):
        with contextlib.suppress(OSError):
            (Path(directory) / f"lost-{rank:06d}").touch()


def original_command() -> list[str] | None:
    """What the person typed, where a parent started this rank."""
    text = os.environ.get(COMMAND_VARIABLE)
    return list(json.loads(text)) if text else None


def set_threads(local_size: int) -> None:
    """Share the cores between the ranks of this host, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, usable_cores() // local_size))
