"""Where a run came from: the commit where there is one, and the variables that the command needs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from horovod_jobs.origin import git_commit, origin


def git(directory: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(
        ["git", *identity, *words], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_and_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None, "nothing is committed yet"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{head}-dirty"


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize(
    ("path", "allowed", "shown"),
    [
        (".", ["mine"], {"PYTHONPATH": "."}),
        ("{here}:src:/opt/code", ["mine"], {"PYTHONPATH": ".:src:/opt/code"}),
        (".", [], {}),
        ("", ["mine"], {}),
    ],
)
def test_the_search_path_is_told_where_code_of_ones_own_takes_part(
    tmp_path: Path, path: str, allowed: list[str], shown: dict[str, str]
) -> None:
    environ = {"PYTHONPATH": path.format(here=tmp_path), "OTHER": "x"}
    found = origin(tmp_path, environ=environ, allow_targets=allowed, data_digest="d")
    assert (found["environment"], found["data_digest"]) == (shown, "d")
