"""The content-addressed store: what a stage made, found again by what it was made from.

``<root>/<kind>-<fingerprint[:16]>/`` holds the files and ``artifact.json`` with the SHA-256 of each. Publication is atomic;
``<root>/.work/<kind>-<fingerprint[:16]>/`` holds a stage's checkpoints until then.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horovod_jobs.errors import ArtifactError
from horovod_jobs.storage import locked, publish_dir, sha256_file, storage_errors, write_json

SCHEMA_VERSION = 1
INDEX = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A published directory: its files with their digests, and what is known of how it was made."""

    kind: str
    fingerprint: str
    path: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """The directory's name in the store."""
        return reference(self.kind, self.fingerprint)

    @property
    def bytes(self) -> int:
        """Size of the payload, without the index."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def file(self, name: str) -> Path:
        """Path of one file.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        if name not in self.files:
            raise ArtifactError(
                f"artifact {self.ref} has no file {name!r} (it has {', '.join(sorted(self.files))}); "
                "give an artifact of another kind"
            )
        return self.path / name


def reference(kind: str, fingerprint: str) -> str:
    """Directory name of an artifact: the kind and the first 16 digits of the fingerprint."""
    return f"{kind}-{fingerprint[:16]}"


def open_artifact(path: str | Path, *, verify: bool = True) -> Artifact:
    """Read an artifact's index and, unless told not to, check the SHA-256 of every file.

    Raises:
        ArtifactError: there is no artifact, or it is damaged (the message names the file).
    """
    path = Path(path)
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        artifact = Artifact(
            kind=index["kind"],
            fingerprint=index["fingerprint"],
            path=path,
            files=index["files"],
            meta=index["meta"],
        )
        version = index["schema_version"]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"no artifact at {path} (there is no {INDEX}); give the path of an artifact directory"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"artifact at {path} is damaged ({INDEX}: {error}); run its job again to make it anew"
        ) from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"artifact at {path} has schema version {version}, this package reads {SCHEMA_VERSION}; run its job again"
        )
    for name, entry in artifact.files.items():
        _check_file(artifact, name, entry, verify=verify)
    return artifact


def _check_file(artifact: Artifact, name: str, entry: dict[str, Any], *, verify: bool) -> None:
    path = artifact.path / name
    try:
        size = path.stat().st_size
        wrong = size != entry["bytes"] and f"{size} bytes instead of {entry['bytes']}"
        if not wrong and verify and sha256_file(path) != entry["sha256"]:
            wrong = "its SHA-256 is not the recorded one"
    except OSError as error:
        wrong = error.strerror or str(error)
    if wrong:
        raise ArtifactError(
            f"artifact {artifact.ref} is damaged ({name}: {wrong}); run its job again, it is noticed and made anew"
        )


class ArtifactStore:
    """Artifacts under one directory. Only rank 0 writes; every rank may read."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, fingerprint: str) -> Path:
        return self.root / reference(kind, fingerprint)

    def lookup(self, kind: str, fingerprint: str, *, verify: bool = True) -> Artifact | None:
        """The artifact with this fingerprint, or None where there is none.

        Raises:
            ArtifactError: it is there and damaged.
        """
        path = self.path(kind, fingerprint)
        if not path.exists():
            return None
        artifact = open_artifact(path, verify=verify)
        if artifact.fingerprint != fingerprint or artifact.kind != kind:
            raise ArtifactError(
                f"artifact {artifact.ref} is damaged (it says it is {artifact.kind}-{artifact.fingerprint})"
            )
        return artifact

    def make(self) -> None:
        """Make the store's directory and write a byte on its disk: what cannot be kept is better not begun. For rank 0.

        Raises:
            StorageError: it cannot be made, or nothing can be written there.
        """
        with storage_errors("make the store", self.root, keys="run.store=..."):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as stream:
                stream.write(b"\0")

    def staging(self, kind: str, fingerprint: str) -> Path:
        """A fresh directory on the store's file system, to be filled and published."""
        with storage_errors("write into the artifact store", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self.root, prefix=f".staging-{reference(kind, fingerprint)}-"))

    def publish(self, staging: Path, *, kind: str, fingerprint: str, meta: dict[str, Any]) -> Artifact:
        """Write the index and make the directory visible in one step.

        Raises:
            StorageError: no space or no permission; nothing is published.
        """
        with storage_errors("publish into the artifact store", self.root):
            files = {
                str(path.relative_to(staging)): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                for path in sorted(staging.rglob("*"))
                if path.is_file() and path.name != INDEX
            }
        target = self.path(kind, fingerprint)
        index = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "fingerprint": fingerprint,
            "files": files,
            "meta": meta,
        }
        write_json(staging / INDEX, index)
        os.chmod(staging, 0o755)
        publish_dir(staging, target)
        return Artifact(kind=kind, fingerprint=fingerprint, path=target, files=files, meta=meta)

    def work(self, kind: str, fingerprint: str) -> Path:
        """Where a stage keeps its checkpoints until its artifact is published."""
        return self.root / ".work" / reference(kind, fingerprint)

    def discard_work(self, kind: str, fingerprint: str) -> None:
        """Remove a published stage's checkpoints."""
        shutil.rmtree(self.work(kind, fingerprint), ignore_errors=True)

    @contextmanager
    def lock(self, kind: str, fingerprint: str) -> Iterator[None]:
        """Keep a second job away from the artifact that this one is making. Held by rank 0.

        Raises:
            StorageError: another process holds it; the message names it.
        """
        work = self.work(kind, fingerprint)
        what = reference(kind, fingerprint)
        busy = f"another job is making {what} ({{holder}}); wait for it to end or choose another store (run.store=...)"
        with locked(work.with_name(work.name + ".lock"), busy=busy):
            yield

    def sweep_staging(self, kind: str, fingerprint: str) -> None:
        """Remove staging directories that killed jobs left behind: this artifact's, whose lock the caller holds, and any a day old."""
        import time

        ours = f".staging-{reference(kind, fingerprint)}-"
        for path in self.root.glob(".staging-*"):
            with suppress(FileNotFoundError):
                if path.name.startswith(ours) or time.time() - path.stat().st_mtime > 86400:
                    shutil.rmtree(path, ignore_errors=True)
