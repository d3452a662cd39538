"""The content-addressed store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from horovod_jobs.artifacts import Artifact, ArtifactStore, open_artifact
from horovod_jobs.errors import ArtifactError, StorageError

PRINT = "ab" * 32


def publish(store: ArtifactStore, content: str = "weights") -> Artifact:
    staging = store.staging("model", PRINT)
    (staging / "sub").mkdir()
    (staging / "model.bin").write_text(content)
    (staging / "sub" / "more.bin").write_text("more")
    return store.publish(staging, kind="model", fingerprint=PRINT, meta={"stage": "teacher"})


def test_what_is_published_is_found_with_its_files(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    assert store.lookup("model", PRINT) is None
    publish(store)
    found = store.lookup("model", PRINT)
    assert found is not None
    assert found.meta == {"stage": "teacher"}
    assert found.file("sub/more.bin").read_text() == "more"
    assert found.bytes == len("weights") + len("more")
    assert found.ref == f"model-{PRINT[:16]}"
    with pytest.raises(ArtifactError, match=r"has no file 'x' \(it has model.bin, sub/more.bin\)"):
        found.file("x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.bin").write_text("weightz"), "model.bin: its SHA-256 is not the recorded one"),
        (lambda path: (path / "model.bin").write_text("w"), "model.bin: 1 bytes instead of 7"),
        (lambda path: (path / "model.bin").unlink(), "model.bin: No such file"),
        (lambda path: (path / "artifact.json").write_text("{"), "artifact.json"),
        (lambda path: (path / "artifact.json").write_text("{}"), "artifact.json: 'kind'"),
    ],
)
def test_damage_is_noticed_and_named(tmp_path: Path, damage, message: str) -> None:
    store = ArtifactStore(tmp_path)
    damage(publish(store).path)
    with pytest.raises(ArtifactError, match=message):
        store.lookup("model", PRINT)
    assert publish(store).path.exists(), "it can be made again over the damaged one"
    assert store.lookup("model", PRINT) is not None


def test_a_path_without_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact.json"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("at", [1, 2], ids=["before the new one is in place", "before the old one is removed"])
def test_what_a_killed_replacement_leaves_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, "old")
    replace, calls = os.replace, []

    def killed(source: object, target: object) -> None:
        if Path(str(target)).name in ("content", f"model-{PRINT[:16]}"):  # Not the index, which is renamed too.
            calls.append(target)
            if len(calls) > at:
                raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        publish(store, "new")
    monkeypatch.undo()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".old-")], "it was killed in between"
    other = tmp_path / ".old-model-0123456789abcdef-x"
    other.mkdir()
    store.sweep_staging("model", PRINT)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [other.name], (
        "another job's is young"
    )
    os.utime(other, (0, 0))
    store.sweep_staging("model", PRINT)
    assert not other.exists()


def test_two_jobs_do_not_make_the_same_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with store.lock("model", PRINT):
        with pytest.raises(StorageError, match=r"another job is making model-abababababababab \(process \d+ on "):
            with store.lock("model", PRINT):
                pass
        with store.lock("model", "cd" * 32):
            pass
    with store.lock("model", PRINT):
        pass
