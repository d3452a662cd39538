"""Atomic publication and errors of the file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from horovod_jobs.errors import StorageError
from horovod_jobs.storage import (
    canonical_json,
    check_can_write,
    digest_of,
    publish_dir,
    storage_errors,
    update_link,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device.*free some space"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_publish_replaces_a_directory_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        staging = tmp_path / "staging"
        staging.mkdir()
        (staging / content).write_text(content)
        publish_dir(staging, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_canonical_json_does_not_depend_on_order() -> None:
    assert digest_of({"b": 1, "a": [1.0, None]}) == digest_of({"a": [1.0, None], "b": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json(float("nan"))


def test_storage_error_names_the_path_and_the_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"cannot make it .*file/below.*choose another directory"),
        storage_errors("make it", tmp_path),
    ):
        (tmp_path / "file").write_text("")
        (tmp_path / "file" / "below").mkdir()


def test_link_is_moved(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        update_link(tmp_path / "latest", name)
        assert os.readlink(tmp_path / "latest") == name


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("inf")})
    assert not (tmp_path / "x.json").exists()


def test_a_plan_finds_out_whether_a_directory_could_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for good in (tmp_path, tmp_path / "a" / "b" / "c"):
        check_can_write(good)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"
    for bad in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x/y")):
        with pytest.raises(StorageError) as caught, storage_errors("write to", bad, keys="run.root=..."):
            check_can_write(bad)
        assert str(caught.value).startswith(f"cannot write to {bad} (")
        assert str(caught.value).endswith("choose another directory (run.root=...)")
