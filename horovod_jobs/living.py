"""Whether a run that says it goes on does: what is seen of its ranks' signs of life, and whether somebody holds its lock.

A run that was killed outright (every process at once, a power cut) could not say so: its manifest says ``running`` for ever. It is
*gone* where no rank has given a sign of life for ``GONE_AFTER_BEATS`` of its intervals and no process of this host holds the run's lock.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from horovod_jobs.pulse import DIRECTORY, INTERVAL_S, read_sign
from horovod_jobs.storage import is_locked

GONE_AFTER_BEATS = 30  # A world that launch.restarts starts again is silent for as long as it takes to start.


class Sightings:
    """The signs of life of a run's ranks, looked at once or again and again.

    Ages are counted from the changes of a sign on the looker's own clock: hosts' clocks differ and jump. Who has not seen a sign change
    yet has its file's time only.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.signs: dict[int, dict[str, Any]] = {}
        self._beats: dict[int, Any] = {}  # the last that was seen of a rank
        self._since: dict[int, float] = {}  # of its first look, or of its last change
        self._changed: set[int] = set()
        self._none_since: float | None = None

    def look(self, now: float) -> None:
        """Read all signs; ``now`` is a moment of the looker's monotonic clock."""
        self.signs = {}
        for path in (self._run_dir / DIRECTORY).glob("rank-*.json"):
            number, sign = path.stem.removeprefix("rank-"), read_sign(path)
            if number.isdigit() and sign is not None:
                self.signs[int(number)] = sign
        for rank, sign in self.signs.items():
            if rank not in self._beats:
                self._since[rank] = now
            elif sign["beat"] != self._beats[rank]:
                self._since[rank] = now
                self._changed.add(rank)
            self._beats[rank] = sign["beat"]
        if self.signs:
            self._none_since = None
        elif self._none_since is None:
            self._none_since = now

    def age_s(self, rank: int, now: float) -> float:
        """How old a rank's sign is: since it was seen to change, or by its file's time."""
        if rank in self._changed:
            return now - self._since[rank]
        return _file_age_s(self._run_dir / DIRECTORY / f"rank-{rank}.json")

    def gone(self, now: float) -> bool:
        """Whether all ranks have been silent for long enough before the looker's eyes, and nobody holds the lock."""
        waits = [
            now - self._since[rank] > GONE_AFTER_BEATS * float(sign["every_s"]) for rank, sign in self.signs.items()
        ]
        none_since = now if self._none_since is None else self._none_since
        silent = all(waits) if waits else now - none_since > GONE_AFTER_BEATS * INTERVAL_S
        return silent and not is_locked(self._run_dir / ".lock")

    def gone_at_once(self) -> bool:
        """The same for who looks once: by the files' times."""
        ages = [
            _file_age_s(self._run_dir / DIRECTORY / f"rank-{rank}.json") > GONE_AFTER_BEATS * float(sign["every_s"])
            for rank, sign in self.signs.items()
        ]
        silent = all(ages) if ages else _file_age_s(self._run_dir / "manifest.json") > GONE_AFTER_BEATS * INTERVAL_S
        return silent and not is_locked(self._run_dir / ".lock")


def is_gone(run_dir: Path) -> bool:
    """Whether a run whose manifest says ``running`` is gone, by one look."""
    sightings = Sightings(run_dir)
    sightings.look(time.monotonic())
    return sightings.gone_at_once()


def _file_age_s(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0  # It was replaced or taken away at this moment: somebody lives.
