"""Where a run came from: what it takes, beside the command, to repeat it elsewhere."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def origin(
    directory: Path, *, environ: Mapping[str, str], allow_targets: Sequence[str], data_digest: str
) -> dict[str, Any]:
    """The manifest's ``origin``: the data's digest, the directory's commit, and the variables that the command needs.

    PYTHONPATH is needed where a job names code of its own; paths in and under ``directory`` are told relative to it.
    """
    search = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    shown = os.pathsep.join(_relative(entry, directory) for entry in search)
    return {
        "data_digest": data_digest,
        "git_commit": git_commit(directory),
        "environment": {"PYTHONPATH": shown} if allow_targets and shown else {},
    }


def git_commit(directory: Path) -> str | None:
    """The commit of a working directory, with ``-dirty`` where tracked files differ; None without git or a repository."""
    # fsmonitor: a repository's own config could name a program there.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _relative(entry: str, directory: Path) -> str:
    path = Path(os.path.normpath(directory / entry))
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)
