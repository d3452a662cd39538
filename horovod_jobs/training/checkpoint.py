"""Checkpoints of a stage under way: atomic, checked, the last few and the best. Rank 0 writes and reads; all get the bytes.

What each rank has of its own travels to rank 0, one rank at a time, so ranks need no common file system.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from horovod_jobs.comm.world import World
from horovod_jobs.storage import publish_dir, sha256_file, storage_errors, write_json

_STATE, _INDEX = "state.pt", "checkpoint.json"
RankState = dict[str, torch.Tensor]


class Checkpoints:
    """``<directory>/step-<n>/`` holds ``state.pt`` (tensors and plain values only), ``rank-<r>.pt`` where ranks have something of
    their own, the SHA-256 of each, and which ``best-<n>/`` belongs to it."""

    def __init__(self, directory: Path, *, keep: int, world: World, log: logging.Logger) -> None:
        self._directory, self._keep, self._world, self._log = directory, keep, world, log

    def save(
        self, state: dict[str, Any], *, step: int, best_step: int | None = None, rank_state: RankState | None = None
    ) -> None:
        """Collective. Publish a checkpoint, then drop those that are not among the last ``keep``, and every best that is none of theirs.

        ``rank_state`` is what this rank alone has; either every rank gives some or none does.

        Raises:
            StorageError: it cannot be written; the ones before are untouched.
        """
        files = {_STATE: _dumped(state)} if self._world.is_main else {}
        if rank_state:
            for rank in range(self._world.size):
                data = self._send(rank_state if rank == self._world.rank else None, root=rank)
                if self._world.is_main:
                    files[f"rank-{rank}.pt"] = data
        self._world.main(
            lambda: self._write(files, name=f"step-{step:09d}", best_step=best_step), name="checkpoint.save"
        )
        self._world.main(lambda: self._prune(best_step), name="checkpoint.prune")

    def save_best(self, state: dict[str, Any], *, step: int) -> None:
        """Collective. Publish the best weights so far; those before that belong to no checkpoint go."""
        self._world.main(lambda: self._write({_STATE: _dumped(state)}, name=_best(step)), name="checkpoint.best")
        self._world.main(lambda: self._prune(step), name="checkpoint.prune")

    def has_best(self, step: int) -> bool:
        """Collective. Whether the best weights of that step are there and whole."""
        return self._world.main(
            lambda: self._read(self._directory / _best(step)) is not None, name="checkpoint.has_best"
        )

    def load_best(self, step: int) -> dict[str, Any] | None:
        """Collective. The best weights, which ``save_best`` has published in this run or before it; None where they are damaged."""
        return self._share(lambda: self._read(self._directory / _best(step)), name="checkpoint.load_best")

    def load_last(self, *, with_best: bool = False) -> tuple[dict[str, Any], list[RankState]] | None:
        """Collective. The newest checkpoint that is whole, or None. A damaged one is named, removed and passed over.

        ``with_best``: one whose best weights are damaged is passed over too, because from the one before it the run ends as it
        would have; where there is none before it, it is taken even so, and ``has_best`` tells.

        Beside the common state: what this rank had of its own, and in a smaller world also that of ranks that are gone.
        """
        found: list[Path] = []
        state = self._share(lambda: self._newest(found, with_best=with_best), name="checkpoint.load")
        if state is None:
            return None
        count = self._world.main(lambda: len(list(found[0].glob("rank-*.pt"))), name="checkpoint.ranks")
        mine: list[RankState] = []
        for rank in range(count):
            part = self._share(
                lambda rank=rank: (found[0] / f"rank-{rank}.pt").read_bytes(),  # type: ignore[misc]
                name=f"checkpoint.rank.{rank}",
            )
            if rank % self._world.size == self._world.rank and part is not None:
                mine.append(part)
        return state, mine

    # --- rank 0 -----------------------------------------------------------------------------------------------------
    def _write(self, files: dict[str, bytes], *, name: str, best_step: int | None = None) -> None:
        with storage_errors("write a checkpoint to", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            for stale in [*self._directory.glob(".new-*"), *self._directory.glob(".old-*")]:
                shutil.rmtree(stale, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(dir=self._directory, prefix=".new-"))
            try:
                for file, data in files.items():
                    (staging / file).write_bytes(data)
                digests = {file: sha256_file(staging / file) for file in files}
                write_json(staging / _INDEX, {"sha256": digests, "best_step": best_step})
                publish_dir(staging, self._directory / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _prune(self, best_step: int | None) -> None:
        """Keep the last few, and the best of each: who falls back to the one before needs the best of that one."""
        steps = sorted(self._directory.glob("step-*"))
        wanted = {best_step, *(self._best_of(path) for path in steps[-self._keep :])}
        names = {_best(step) for step in wanted if step is not None}
        stale = [path for path in self._directory.glob("best-*") if path.name not in names]
        for path in [*steps[: -self._keep], *stale]:
            shutil.rmtree(path, ignore_errors=True)

    def _newest(self, found: list[Path], *, with_best: bool) -> bytes | None:
        spare: tuple[Path, bytes] | None = None
        for path in sorted(self._directory.glob("step-*"), reverse=True):
            data = self._read(path)
            if data is None:
                self._log.warning("checkpoint %s is damaged; falling back to the one before", path.name)
                shutil.rmtree(path, ignore_errors=True)
                continue
            best = self._best_of(path) if with_best else None
            if best is None or self._read(self._directory / _best(best)) is not None:
                found.append(path)
                return data
            self._log.warning(
                "checkpoint %s, the best weights of %s, is damaged; falling back to the one before",
                _best(best),
                path.name,
            )
            spare = spare or (path, data)
        if spare is None:
            return None
        found.append(spare[0])
        return spare[1]

    def _best_of(self, path: Path) -> int | None:
        try:
            step = json.loads((path / _INDEX).read_text(encoding="utf-8")).get("best_step")
        except (OSError, ValueError, AttributeError):
            return None
        return step if isinstance(step, int) else None

    def _read(self, path: Path) -> bytes | None:
        try:
            expected = json.loads((path / _INDEX).read_text(encoding="utf-8"))["sha256"]
            if any(sha256_file(path / file) != digest for file, digest in expected.items()):
                return None
            return (path / _STATE).read_bytes()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    # --- all ranks --------------------------------------------------------------------------------------------------
    def _send(self, state: RankState | None, *, root: int) -> bytes:
        """One rank's state as bytes, on every rank."""
        mine = _dumped(state) if state is not None else b""
        size = self._world.gather_json(len(mine), name=f"checkpoint.size.{root}")[root]
        return self._bytes(mine or None, size=size, root=root, name=f"checkpoint.part.{root}")

    def _share(self, read: Callable[[], bytes | None], *, name: str) -> dict[str, Any] | None:
        """What rank 0 reads, on every rank."""
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
        data = self._bytes(kept[0] if kept else None, size=size, root=0, name=f"{name}.bytes")
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state

    def _bytes(self, mine: bytes | None, *, size: int, root: int, name: str) -> bytes:
        tensor = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else torch.empty(size, dtype=torch.uint8)
        return self._world.broadcast(tensor, name=name, root=root).numpy().tobytes()


def _best(step: int) -> str:
    return f"best-{step:09d}"


def _dumped(state: dict[str, Any]) -> bytes:
    # Through a buffer: torch reports a full disk as an error of its own kind without a reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
