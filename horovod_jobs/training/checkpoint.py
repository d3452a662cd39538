"""Checkpoints of a stage under way: atomic, checked, the last few and the best. Rank 0 writes and reads; all get the bytes."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from horovod_jobs.comm.world import World
from horovod_jobs.storage import publish_dir, sha256_file, storage_errors, write_json

_STATE, _INDEX = "state.pt", "checkpoint.json"


class Checkpoints:
    """``<directory>/step-<n>/`` holds ``state.pt`` (tensors and plain values only) and its SHA-256."""

    def __init__(self, directory: Path, *, keep: int, world: World, log: logging.Logger) -> None:
        self._directory, self._keep, self._world, self._log = directory, keep, world, log

    def save(self, state: dict[str, Any], *, step: int, best_step: int | None = None) -> None:
        """Collective. Publish a checkpoint, then drop those that are neither among the last ``keep`` nor the best.

        Raises:
            StorageError: it cannot be written; the ones before are untouched.
        """
        self._world.main(lambda: self._write(state, name=f"step-{step:09d}"), name="checkpoint.save")
        self._world.main(lambda: self._prune(best_step), name="checkpoint.prune")

    def save_best(self, state: dict[str, Any], *, step: int) -> None:
        """Collective. Publish the best weights so far; the ones before go with the next ``save``."""
        self._world.main(lambda: self._write(state, name=f"best-{step:09d}"), name="checkpoint.best")

    def load_best(self, step: int) -> dict[str, Any]:
        """Collective. The best weights, which ``save_best`` has published in this run or before it."""
        state = self._share(lambda: self._read(self._directory / f"best-{step:09d}"), name="checkpoint.load_best")
        assert state is not None, "save_best has published them"
        return state

    def load_last(self) -> dict[str, Any] | None:
        """Collective. The newest checkpoint that is whole, or None. A damaged one is named, removed and passed over."""
        return self._share(self._newest, name="checkpoint.load")

    # --- rank 0 -----------------------------------------------------------------------------------------------------
    def _write(self, state: dict[str, Any], *, name: str) -> None:
        with storage_errors("write a checkpoint to", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            for stale in self._directory.glob(".new-*"):
                shutil.rmtree(stale, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(dir=self._directory, prefix=".new-"))
            try:
                # Through a buffer: torch reports a full disk as an error of its own kind without a reason.
                buffer = io.BytesIO()
                torch.save(state, buffer)
                (staging / _STATE).write_bytes(buffer.getbuffer())
                write_json(staging / _INDEX, {"sha256": sha256_file(staging / _STATE)})
                publish_dir(staging, self._directory / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _prune(self, best_step: int | None) -> None:
        steps = sorted(self._directory.glob("step-*"))
        best = [
            path for path in self._directory.glob("best-*") if best_step is None or path.name != f"best-{best_step:09d}"
        ]
        for path in [*steps[: -self._keep], *best]:
            shutil.rmtree(path, ignore_errors=True)

    def _newest(self) -> bytes | None:
        for path in sorted(self._directory.glob("step-*"), reverse=True):
            data = self._read(path)
            if data is not None:
                return data
            self._log.warning("checkpoint %s is damaged; falling back to the one before", path.name)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def _read(self, path: Path) -> bytes | None:
        try:
            expected = json.loads((path / _INDEX).read_text(encoding="utf-8"))["sha256"]
            if sha256_file(path / _STATE) != expected:
                return None
            return (path / _STATE).read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # --- all ranks --------------------------------------------------------------------------------------------------
    def _share(self, read: Any, *, name: str) -> dict[str, Any] | None:
        kept: list[bytes] = []

        def measure() -> int:
            data = read()
            if data is None:
                return -1
            kept.append(data)
            return len(data)

        size = self._world.main(measure, name=f"{name}.size")
        if size < 0:
            return None
        tensor = (
            torch.frombuffer(bytearray(kept[0]), dtype=torch.uint8) if kept else torch.empty(size, dtype=torch.uint8)
        )
        data = self._world.broadcast(tensor, name=f"{name}.bytes").numpy().tobytes()
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state
